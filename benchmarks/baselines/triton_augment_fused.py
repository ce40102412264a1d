"""Crop, flip and normalise as triton-augment 0.3 fuses them; it needs a CUDA device and float images in 0..1."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from .work import MEAN, STD


def build(
    images: Tensor, corners: Sequence[tuple[int, int]], flips: Sequence[bool], size: tuple[int, int]
) -> Callable[[], Tensor]:
    """``images``: float ``[N, 3, H, W]`` on the device; ``corners``: (x, y) of each crop of ``size`` (h, w)."""
    if not images.is_cuda:
        pytest.skip("triton-augment needs a CUDA device")
    pytest.importorskip("triton_augment", reason="triton-augment is not installed (requirements/bench.txt)")
    from triton_augment.functional import fused_augment

    left, top = (torch.tensor(c, dtype=torch.int32, device=images.device) for c in zip(*corners, strict=True))
    mirrored = torch.tensor(flips, dtype=torch.uint8, device=images.device)
    mean, std = tuple(m / 255 for m in MEAN), tuple(s / 255 for s in STD)
    return lambda: fused_augment(images, top, left, *size, flip_horizontal=mirrored, mean=mean, std=std)
