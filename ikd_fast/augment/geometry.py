"""Geometry of the crop and the flip, on boxes in float64 and on pixels."""

from __future__ import annotations

import torch
from torch import Tensor

Window = tuple[int, int, int, int]
BOX_FORMATS = ("xyxy", "cxcywh_norm")


def to_xyxy(boxes: Tensor, box_format: str, size: tuple[int, int]) -> Tensor:
    """``[n, 4]`` boxes of any dtype to float64 xyxy pixels of an image of ``size`` (h, w)."""
    boxes = boxes.to(torch.float64).reshape(-1, 4)
    if box_format == "xyxy":
        return boxes
    scale = torch.stack(
        [torch.full((), float(v), dtype=boxes.dtype, device=boxes.device) for v in (size[1], size[0])]
    )
    centre, half = boxes[:, :2] * scale, boxes[:, 2:] * scale / 2
    return torch.cat([centre - half, centre + half], dim=1)


def from_xyxy(boxes: Tensor, box_format: str, size: tuple[int, int]) -> Tensor:
    if box_format == "xyxy":
        return boxes
    scale = torch.stack(
        [torch.full((), float(v), dtype=boxes.dtype, device=boxes.device) for v in (size[1], size[0])]
    )
    low, high = boxes[:, :2], boxes[:, 2:]
    return torch.cat([(low + high) / 2 / scale, (high - low) / scale], dim=1)


def clip_to_window(boxes: Tensor, window: Window) -> Tensor:
    """xyxy boxes in the coordinates of the window, clipped to it."""
    x0, y0, x1, y1 = window
    x = (boxes[:, 0::2] - x0).clamp(0, x1 - x0)
    y = (boxes[:, 1::2] - y0).clamp(0, y1 - y0)
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)


def overlaps(boxes: Tensor, window: Window) -> Tensor:
    """Which xyxy boxes have some area inside the window. Compared, not subtracted: the plan decides by the same test."""
    x0, y0, x1, y1 = window
    left, top, right, bottom = boxes.unbind(1)
    within = (left < x1) & (right > x0) & (top < y1) & (bottom > y0)
    return within & (left < right) & (top < bottom)


def kept(boxes: Tensor, window: Window, min_kept: float) -> Tensor:
    """Which float64 xyxy boxes stay: some area inside the window, and at least ``min_kept`` of their own."""
    stays = overlaps(boxes, window)
    if min_kept > 0:
        inside, sides = clip_to_window(boxes, window), boxes[:, 2:] - boxes[:, :2]
        left = (inside[:, 2] - inside[:, 0]) * (inside[:, 3] - inside[:, 1])
        stays &= left >= min_kept * sides[:, 0] * sides[:, 1]
    return stays


def flip_boxes(boxes: Tensor, width: float) -> Tensor:
    """Mirror xyxy boxes of an image of this width: x' = width - x."""
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)


def crop_flip(image: Tensor, window: Window, flip: bool) -> Tensor:
    """``[..., H, W]`` to the window's ``[..., h, w]``, mirrored if asked; a view where it can be."""
    x0, y0, x1, y1 = window
    out = image[..., y0:y1, x0:x1]
    return out.flip(-1) if flip else out
