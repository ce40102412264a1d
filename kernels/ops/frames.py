"""Checks of the valid parts of padded images: small int64 tensors on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import check_tensors


def check_small(op: str, n: int, **tensors: tuple[Tensor, tuple[int, ...]]) -> None:
    """int64 of the shapes given, on the CPU."""
    check_tensors(op, n, **{name: (value, shape, torch.int64) for name, (value, shape) in tensors.items()})


def check_frames(op: str, frames: Tensor, image: Sequence[int]) -> list[tuple[int, int]]:
    """``[N, 2]`` (h, w) as tuples, each within an image of (H, W)."""
    height, width = image
    found = [(h, w) for h, w in frames.tolist()]
    for i, (h, w) in enumerate(found):
        if not (1 <= h <= height and 1 <= w <= width):
            raise ValueError(
                f"{op}: frames[{i}]: expected (h, w) within the image's {height}x{width}, got {h}x{w}"
            )
    return found
