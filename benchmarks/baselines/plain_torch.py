"""The chain as one would write it in PyTorch by hand, eager and compiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .work import MEAN, STD, Work


def normalise(images: Sequence[Tensor], padded: tuple[int, int]) -> Tensor:
    """uint8 or float ``[h, w, 3]`` BGR pixels to the padded float32 stack."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    rows = []
    for image in images:
        x = (image.permute(2, 0, 1).flip(0).float() - mean) / std
        rows.append(F.pad(x, (0, padded[1] - x.shape[2], 0, padded[0] - x.shape[1])))
    return torch.stack(rows)


def chain(
    images: Sequence[Tensor],
    windows: Sequence[tuple[int, int, int, int]],
    sigmas: Sequence[float],
    padded: tuple[int, int],
) -> Tensor:
    cut = []
    for image, (x0, y0, x1, y1), sigma in zip(images, windows, sigmas, strict=True):
        x = image[y0:y1, x0:x1]
        if sigma > 0:
            x = (x + torch.randn(x.shape) * sigma).clamp(0, 255)
        cut.append(x)
    return normalise(cut, padded)


def build(work: Work) -> Callable[[], Tensor]:
    return lambda: chain(work.images, work.windows, work.sigmas, work.padded)


def build_compiled(work: Work) -> Callable[[], Tensor]:
    """``torch.compile`` of :func:`chain`; windows are constants of the graph."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    compiled = torch.compile(chain, fullgraph=True, dynamic=False)
    return lambda: compiled(work.images, work.windows, work.sigmas, work.padded)
