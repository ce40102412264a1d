"""``AdaptiveFreqAug`` in mmdet's two other forms: a pipeline transform and a batch augment."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ikd_fast.augment import AdaptiveFreqAug, AugPlan

from mmcv.transforms import BaseTransform
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes

from .preprocessor import build_augment, plan_samples
from .progress import Progress, SharedEpoch
from .samples import box_tensor, crop_masks, crop_sample, image_key, mirrored, move_boxes


@TRANSFORMS.register_module(name="AdaptiveFreqAug")
class AdaptiveFreqAugTransform(BaseTransform):
    """In the loader, on one uint8 image: ``dict(type="AdaptiveFreqAug", ...)`` in ``train_pipeline``.

    It goes on to the end of the run: ``stop_at`` of an ``IKDDistiller`` does not reach the loader, and its noise is in what
    the attack starts from. Give the distiller ``augment=`` instead where you have one.

    Placed after ``Resize`` and ``RandomFlip`` it makes the preprocessor's plan; placed before ``Resize`` the noise is resized
    with the image, as in the published code (a 1.67x bilinear resize leaves 0.68 of its standard deviation).

    Required keys: img, gt_bboxes, gt_bboxes_labels, gt_ignore_flags, img_id, img_path. Optional: gt_masks, gt_seg_map.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.augment = AdaptiveFreqAug(**kwargs)
        self._epoch = SharedEpoch()

    def set_epoch(self, epoch: int) -> None:
        """The sampler's pass; seen by loader workers that are already running."""
        self._epoch.set(epoch)

    def transform(self, results: dict) -> dict:
        plan = self.plan_for(results)
        boxes, ignore = _boxes(results), _ignored(results)
        target = {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.long), "ignore": ignore}
        image = torch.from_numpy(np.ascontiguousarray(results["img"]))
        images, _ = self.augment.apply([image], [target], plan)
        results["img"] = np.ascontiguousarray(images[0].numpy())
        self.record(results, plan)
        return results

    def plan_for(self, results: dict) -> AugPlan:
        """The plan of ``results``' image in this epoch; its pixels are looked at for their shape only."""
        return self.augment.plan(
            [_boxes(results)],
            [results["img"].shape[:2]],
            [image_key(results)],
            self._epoch.require("AdaptiveFreqAug"),
            scale=[tuple(float(v) for v in results.get("scale_factor", (1.0, 1.0))[:2])],
            ignore=[_ignored(results)],
        )

    def record(self, results: dict, plan: AugPlan) -> None:
        """All that ``plan`` changes in ``results`` but the pixels: boxes, labels, masks and the geometry's keys."""
        boxes = _boxes(results)
        x0, y0, x1, y1 = (int(v) for v in plan.window[0])
        window = (x0, y0, x1, y1)
        flip = bool(plan.flip[0])
        before = tuple(plan.sizes[0].tolist())
        whole = (y1 - y0, x1 - x0) == before
        moved, stays = move_boxes(boxes, window, flip, None if whole else plan.min_kept)
        keep = stays.numpy()
        results["img_shape"] = (y1 - y0, x1 - x0)
        boxed = not isinstance(results["gt_bboxes"], (np.ndarray, Tensor))
        results["gt_bboxes"] = HorizontalBoxes(moved) if boxed else moved.numpy()
        for key in ("gt_bboxes_labels", "gt_ignore_flags"):
            if key in results:
                results[key] = np.asarray(results[key])[keep]
        if results.get("gt_masks") is not None:
            masks = results["gt_masks"][np.flatnonzero(keep)]
            results["gt_masks"] = crop_masks(masks, window, flip, before)
        if results.get("gt_seg_map") is not None:
            seg = results["gt_seg_map"][y0:y1, x0:x1]
            results["gt_seg_map"] = np.ascontiguousarray(seg[:, ::-1] if flip else seg)
        here = np.array(
            [[-1 if flip else 1, 0, x1 if flip else -x0], [0, 1, -y0], [0, 0, 1]], dtype=np.float32
        )
        there = results.get("homography_matrix")
        results["homography_matrix"] = here if there is None else here @ there
        if flip:
            results["flip"], results["flip_direction"] = mirrored(
                results.get("flip", False), results.get("flip_direction")
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.augment!r})"


def _boxes(results: dict) -> Tensor:
    return torch.as_tensor(box_tensor(results["gt_bboxes"]), dtype=torch.float32).reshape(-1, 4)


def _ignored(results: dict) -> Tensor:
    flags = results.get("gt_ignore_flags")
    return torch.as_tensor(np.zeros(len(_boxes(results)), bool) if flags is None else np.asarray(flags, bool))


@MODELS.register_module(name="AdaptiveFreqAug")
class AdaptiveFreqAugBatch(nn.Module):
    """As one of a data preprocessor's ``batch_augments``, on the normalised, stacked batch.

    Boxes are on the device by then and are copied back once per batch to plan; ``IKDDetDataPreprocessor`` needs no such copy.
    Images keep their place in the batch: a cropped one lies top left, zeros around it. Noise is drawn in the network's
    channel order, so with ``bgr_to_rgb`` its pixels differ from the other ways in; branch, window and sigma do not.

    Args:
        mean, std: the preprocessor's, so that sigma means grey levels; or ``value_range``. Others as :class:`AdaptiveFreqAug`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        augment = build_augment(kwargs, None)
        assert augment is not None
        self.augment = augment
        self.progress = Progress()

    def set_progress(self, epoch: int, step: int) -> None:
        self.progress.epoch, self.progress.step = epoch, step

    def forward(
        self, inputs: Tensor, data_samples: list[DetDataSample]
    ) -> tuple[Tensor, list[DetDataSample]]:
        host = [sample.cpu() for sample in data_samples]
        sizes = [(int(h), int(w)) for h, w in (sample.metainfo["img_shape"][:2] for sample in host)]
        keys = [image_key(sample.metainfo) for sample in host]
        plan = plan_samples(self.augment, host, sizes, keys, self.progress.require_epoch("AdaptiveFreqAug"))
        targets = [
            {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "size": size}
            for size in sizes
        ]
        images, _ = self.augment.apply(inputs, targets, plan)
        return images, [crop_sample(sample, plan, i) for i, sample in enumerate(data_samples)]
