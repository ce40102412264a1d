"""The dictionaries of an image's annotations: what follows the boxes, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import as_boxes, as_flags
from .geometry import Window, clip_to_window, crop_flip, flip_boxes, from_xyxy, kept, to_xyxy
from .images import as_tensor, own

Targets = Sequence[Mapping[str, Any]]

# Facts about the image, even where their length happens to be the number of boxes.
IMAGE_KEYS = frozenset(
    [
        "size",
        "orig_size",
        "scale",
        "scale_factor",
        "image_id",
        "img_id",
        "img_shape",
        "ori_shape",
        "pad_shape",
    ]
)


def boxes_of(target: Mapping[str, Any], i: int) -> Tensor:
    if not isinstance(target, Mapping) or "boxes" not in target:
        got = f"keys {sorted(map(str, target))}" if isinstance(target, Mapping) else type(target).__name__
        raise ValueError(
            f"targets[{i}]: expected a dict with 'boxes' [n, 4], got {got}; write dict(boxes=..., labels=...)"
        )
    return as_boxes(target["boxes"], f"targets[{i}]['boxes']")


def ignored(target: Mapping[str, Any], n: int, i: int) -> Tensor | None:
    """bool [n]: boxes marked ``ignore`` or ``iscrowd``; None where there is no such key."""
    flags = None
    for key in ("ignore", "iscrowd"):
        if target.get(key) is not None:
            found = as_flags(target[key], n, f"targets[{i}][{key!r}]")
            flags = found if flags is None else flags | found
    return flags


def valid_size(target: Mapping[str, Any]) -> tuple[int, int] | None:
    size = target.get("size")
    return None if size is None else (int(size[0]), int(size[1]))


def _rows(value: Any, keep: Tensor) -> Any:
    """The kept rows; a copy, so that the caller's value never changes through it."""
    if isinstance(value, Tensor):
        return value[keep.to(value.device)]
    mask = keep.cpu().numpy()
    return (
        value[mask] if isinstance(value, np.ndarray) else [v for v, k in zip(value, mask, strict=True) if k]
    )


def _follows(key: str, value: Any, n: int) -> bool:
    if key in IMAGE_KEYS:
        return False
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0 and value.shape[0] == n
    return isinstance(value, list) and len(value) == n


def _like(boxes: Tensor, original: Any) -> Any:
    if isinstance(original, Tensor):
        return boxes.to(original.dtype)
    array = boxes.cpu().numpy()
    return array.astype(original.dtype) if isinstance(original, np.ndarray) else array.tolist()


def _masks(
    masks: Any, window: Window, flip: bool, size: tuple[int, int], canvas: tuple[int, int] | None, i: int
) -> Any:
    """Crop and flip ``[n, H, W]`` masks; those of a stack's size (``canvas``) keep it, as the stack does."""
    tensor = as_tensor(masks, f"targets[{i}]['masks']")
    if tensor.dim() != 3 or tuple(tensor.shape[1:]) not in (size, canvas):
        raise ValueError(
            f"targets[{i}]['masks']: expected [n, {size[0]}, {size[1]}] bool or uint8, "
            f"got {list(tensor.shape)}"
        )
    cut = crop_flip(tensor[:, : size[0], : size[1]], window, flip)
    if tuple(tensor.shape[1:]) == canvas:
        out = torch.zeros_like(tensor)
        out[:, : cut.shape[1], : cut.shape[2]] = cut
        cut = out
    cut = own(cut, tensor)
    return cut.numpy() if isinstance(masks, np.ndarray) else cut


def transform(
    target: Mapping[str, Any],
    window: Window,
    flip: bool,
    size: tuple[int, int],
    canvas: tuple[int, int] | None,
    box_format: str,
    drop_empty: bool,
    min_kept: float,
    i: int,
) -> dict[str, Any]:
    """One image's annotations after crop and flip; ``size``: (h, w) before, ``canvas``: the stack's.

    Boxes that keep no area, or less than ``min_kept`` of theirs, go,
    with their labels, masks and every other list, array or tensor of their
    number. Images left whole keep their boxes as they are (those with no area go if ``drop_empty``).
    """
    boxes = boxes_of(target, i)
    n = len(boxes)
    out = dict(target)
    if "labels" in target and len(target["labels"]) != n:
        raise ValueError(f"targets[{i}]['labels']: expected {n}, one per box, got {len(target['labels'])}")
    new_size = (window[3] - window[1], window[2] - window[0])
    cropped = new_size != size
    masks = target.get("masks")
    if masks is not None:
        if len(masks) != n:
            raise ValueError(f"targets[{i}]['masks']: expected {n}, one per box, got {len(masks)}")
        if cropped or flip:
            out["masks"] = _masks(masks, window, flip, size, canvas, i)
    if (cropped or flip or drop_empty) and n:
        xyxy = to_xyxy(boxes, box_format, size)
        keep = kept(xyxy, window, min_kept) if cropped or drop_empty else None
        if cropped:
            xyxy = clip_to_window(xyxy, window)
        if flip:
            xyxy = flip_boxes(xyxy, new_size[1])
        if cropped or flip:
            out["boxes"] = _like(from_xyxy(xyxy, box_format, new_size), target["boxes"])
        if keep is not None:
            for key, value in out.items():
                if _follows(key, value, n):
                    out[key] = _rows(value, keep)
    out["size"] = new_size
    return out
