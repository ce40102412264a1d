"""``DetDataSample`` to the library's plain targets and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ikd_fast import order
from ikd_fast.augment import AugPlan
from ikd_fast.augment.geometry import Window, clip_to_window, flip_boxes, kept

from mmdet.structures import DetDataSample
from mmdet.structures.bbox import BaseBoxes, HorizontalBoxes
from mmengine.structures import InstanceData, PixelData


def image_key(meta: dict[str, Any]) -> int:
    """64-bit key of an image: its folder and file name with its id, so that concatenated sets do not collide.

    Only the last two parts of the path count: the same data set elsewhere on disk keeps its keys.
    """
    path, image_id = meta.get("img_path"), meta.get("img_id")
    if path is None and image_id is None:
        raise KeyError(
            "an image needs img_id or img_path to key its draws; keep them in PackDetInputs: meta_keys=('img_id', 'img_path', "
            "'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')"
        )
    return order.image_key(path, image_id)


def box_tensor(boxes: Any) -> Tensor:
    """xyxy tensor of mmdet boxes, which may be a plain tensor or a ``BaseBoxes``."""
    if isinstance(boxes, BaseBoxes):
        boxes = boxes.convert_to("hbox").tensor if not isinstance(boxes, HorizontalBoxes) else boxes.tensor
    return boxes


def to_targets(samples: Sequence[DetDataSample]) -> list[dict[str, Any]]:
    """Boxes, labels, size and applied resize of each sample, on whatever device they are.

    ``ignored``: the xyxy boxes of ``ignored_instances`` (crowds), where a sample has any: neither object nor background.
    """
    targets = []
    for sample in samples:
        target = {
            "boxes": box_tensor(sample.gt_instances.bboxes),
            "labels": sample.gt_instances.labels,
            "size": tuple(int(v) for v in sample.metainfo["img_shape"][:2]),
            "scale": tuple(float(v) for v in sample.metainfo.get("scale_factor", (1.0, 1.0))[:2]),
        }
        if "ignored_instances" in sample and "bboxes" in sample.ignored_instances:
            target["ignored"] = box_tensor(sample.ignored_instances.bboxes)
        targets.append(target)
    return targets


def from_targets(targets: Sequence[dict[str, Any]], input_shape: tuple[int, int]) -> list[DetDataSample]:
    """Samples that a detector's ``loss`` takes, for images padded to ``input_shape``.

    Ignored boxes have no classes in a target; as ``ignored_instances`` theirs are all 0, which no loss reads.
    """
    samples = []
    for target in targets:
        h, w = target["size"]
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(h, w),
                ori_shape=(h, w),
                pad_shape=input_shape,
                batch_input_shape=input_shape,
                scale_factor=(1.0, 1.0),
            )
        )
        sample.gt_instances = InstanceData(bboxes=target["boxes"], labels=target["labels"])
        ignored = target.get("ignored", target["boxes"].new_zeros(0, 4))
        sample.ignored_instances = InstanceData(
            bboxes=ignored, labels=target["labels"].new_zeros(len(ignored))
        )
        samples.append(sample)
    return samples


def crop_sample(sample: DetDataSample, plan: AugPlan, i: int) -> DetDataSample:
    """A copy of the sample after window and flip ``i`` of the plan: boxes clipped, empty ones dropped with all their fields."""
    x0, y0, x1, y1 = (int(v) for v in plan.window[i])
    flip = bool(plan.flip[i])
    size = (y1 - y0, x1 - x0)
    out = sample.new()
    whole = size == tuple(plan.sizes[i].tolist())
    for name, min_kept in (("gt_instances", plan.min_kept), ("ignored_instances", 0.0)):
        if name in sample:
            moved = _crop_instances(
                sample.get(name),
                (x0, y0, x1, y1),
                flip,
                None if whole else min_kept,
                sample.metainfo["img_shape"],
            )
            out.set_field(moved, name, InstanceData)
    if "proposals" in sample:
        raise ValueError(
            "AdaptiveFreqAug moves gt_instances and ignored_instances, not precomputed proposals: remove them"
        )
    if "gt_sem_seg" in sample:
        cut = {key: value[..., y0:y1, x0:x1] for key, value in sample.gt_sem_seg.items()}
        out.gt_sem_seg = PixelData(
            metainfo=sample.gt_sem_seg.metainfo,
            **{key: value.flip(-1) if flip else value for key, value in cut.items()},
        )
    out.set_metainfo({"img_shape": size, "ikd_window": (x0, y0, x1, y1)})
    if flip:
        flipped, direction = mirrored(
            sample.metainfo.get("flip", False), sample.metainfo.get("flip_direction")
        )
        out.set_metainfo({"flip": flipped, "flip_direction": direction})
    return out


def mirrored(flip: bool, direction: str | None) -> tuple[bool, str | None]:
    """mmdet's ``flip`` and ``flip_direction`` after one more horizontal mirror.

    >>> mirrored(False, None), mirrored(True, "vertical"), mirrored(True, "horizontal")
    ((True, 'horizontal'), (True, 'diagonal'), (False, None))
    """
    after = {None: "horizontal", "horizontal": None, "vertical": "diagonal", "diagonal": "vertical"}
    new = after[direction if flip else None]
    return new is not None, new


def _crop_instances(
    instances: InstanceData, window: Window, flip: bool, min_kept: float | None, size: tuple[int, int]
) -> InstanceData:
    """Instances in the window; ``min_kept=None`` where the window is the whole image of ``size`` and all stay."""
    boxes = box_tensor(instances.bboxes)
    moved, keep = move_boxes(boxes, window, flip, min_kept)
    out = instances[keep]
    out.bboxes = HorizontalBoxes(moved) if isinstance(instances.bboxes, BaseBoxes) else moved
    if "masks" in out:
        out.masks = crop_masks(out.masks, window, flip, size)
    return out


def move_boxes(boxes: Tensor, window: Window, flip: bool, min_kept: float | None) -> tuple[Tensor, Tensor]:
    """xyxy boxes that stay, in the window's coordinates, and the bool ``[n]`` of which they are."""
    exact = boxes.double()
    keep = (
        torch.ones_like(exact[:, 0], dtype=torch.bool) if min_kept is None else kept(exact, window, min_kept)
    )
    moved = exact[keep] if min_kept is None else clip_to_window(exact[keep], window)
    if flip:
        moved = flip_boxes(moved, window[2] - window[0])
    return moved.to(boxes.dtype), keep


def crop_masks(masks: Any, window: Window, flip: bool, size: tuple[int, int]) -> Any:
    """mmdet's bitmaps or polygons in the window's coordinates; those padded beyond the image's ``size`` stay padded."""
    out = masks.crop(np.array(window))
    out = out.flip("horizontal") if flip else out
    padded = (masks.height, masks.width)
    return out if padded == tuple(size[:2]) else out.pad(padded)
