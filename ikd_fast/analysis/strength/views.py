"""Views between the visits of ``carry``: keyed flips and crops of images, with everything that moves along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ikd_fast.attack.memory import View
from ikd_fast.augment.decide import sample_window
from ikd_fast.augment.geometry import Window, clip_to_window, crop_flip, flip_boxes, overlaps
from ikd_fast.kernels.reference.philox import Stream, draw

CROP_RATIO = 0.2
"""Crops keep 0.8 to 1 of each side, as :class:`~ikd_fast.AdaptiveFreqAug` does."""


class Moved(NamedTuple):
    """A batch as the net sees it in one view."""

    images: Tensor
    targets: Any
    sizes: list[tuple[int, int]]
    views: list[View]


def draw_view(
    size: tuple[int, int],
    *,
    seed: int,
    image_id: int,
    visit: int,
    crop_ratio: float = CROP_RATIO,
    align: int = 1,
) -> tuple[Window, bool]:
    """Window and mirror of an image's visit: sides U[1 - crop_ratio, 1), mirrored with probability 0.5; Philox streams CROP, FLIP.

    ``align``: sides and offsets are multiples of it."""
    key = (seed, image_id, visit)
    return sample_window(key, 0, size, crop_ratio, align), draw(*key, Stream.FLIP)[0] < 0.5


def move_batch(
    images: Tensor,
    targets: Any,
    sizes: Sequence[tuple[int, int]],
    drawn: Sequence[tuple[Window, bool]],
    *,
    divisor: int = 1,
) -> Moved:
    """``[N, C, H, W]`` images cropped, mirrored and stacked again with zeros at the bottom right.

    Targets with ``boxes`` get those that are left in the window, clipped to it, with their labels; ``ignored`` boxes likewise.
    ``divisor``: padded sides are multiples of it.
    """
    views, cut, moved = [], [], []
    for i, ((h, w), (window, flip)) in enumerate(zip(sizes, drawn, strict=True)):
        view = View.identity((h, w)).crop(window)
        views.append(view.flip() if flip else view)
        cut.append(crop_flip(images[i, :, :h, :w], window, flip))
        moved.append(_target(targets[i], window, flip) if isinstance(targets, (list, tuple)) else None)
    height = -(-max(c.shape[1] for c in cut) // divisor) * divisor
    width = -(-max(c.shape[2] for c in cut) // divisor) * divisor
    out = images.new_zeros(len(cut), images.shape[1], height, width)
    for row, c in zip(out, cut, strict=True):
        row[:, : c.shape[1], : c.shape[2]] = c
    frames = [(c.shape[1], c.shape[2]) for c in cut]
    return Moved(out, moved if isinstance(targets, (list, tuple)) else targets, frames, views)


def _target(target: Any, window: Window, flip: bool) -> Any:
    if not isinstance(target, dict) or "boxes" not in target:
        return target
    x0, y0, x1, y1 = window
    kept, boxes = _boxes(target["boxes"], window, flip)
    out = {**target, "boxes": boxes, "size": (y1 - y0, x1 - x0)}
    if "labels" in target:
        out["labels"] = target["labels"][kept]
    if "ignored" in target:
        out["ignored"] = _boxes(target["ignored"], window, flip)[1]
    return out


def _boxes(boxes: Tensor, window: Window, flip: bool) -> tuple[Tensor, Tensor]:
    exact = boxes.double()
    kept = overlaps(exact, window)
    moved = clip_to_window(exact[kept], window)
    if flip:
        moved = flip_boxes(moved, window[2] - window[0])
    return kept, torch.as_tensor(moved, dtype=boxes.dtype)
