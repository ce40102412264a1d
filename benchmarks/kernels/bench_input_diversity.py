"""input_diversity on the CPU, forward and with its gradient, beside torch's resize and pad of each image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.comparison import TIMED, assert_same, label
from ikd_fast.kernels import input_diversity

pytestmark = pytest.mark.benchmark(**TIMED)

SHAPE, FILL = (2, 3, 800, 1344), 0.5
# Shrunk to 0.93 and 0.98 of their sides, as rate 0.9 draws them.
WINDOWS = [(40, 25, 1250, 744), (8, 10, 1317, 784)]


def op(images: Tensor) -> Tensor:
    frames = torch.tensor([SHAPE[2:]] * SHAPE[0])
    return input_diversity(images, frames, torch.tensor(WINDOWS), torch.tensor(FILL))


def plain(images: Tensor) -> Tensor:
    """What torchattacks does to a batch, image by image, since each has its own window."""
    rows = []
    for image, (x0, y0, w, h) in zip(images.split(1), WINDOWS, strict=True):
        small = F.interpolate(image, size=(h, w), mode="bilinear", align_corners=False)
        margins = (x0, SHAPE[3] - x0 - w, y0, SHAPE[2] - y0 - h)
        rows.append(F.pad(small, margins, value=FILL))
    return torch.cat(rows)


SIDES = {"input_diversity": op, "F.interpolate + F.pad": plain}


def gradient(side: str, images: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad(SIDES[side](images), images, upstream)[0]


@pytest.mark.parametrize("side", SIDES)
def test_forward(benchmark, side: str) -> None:
    images = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    # Both know source coordinates, up to 1344, to float32: 2e-4 of a pixel.
    assert_same({name: run(images) for name, run in SIDES.items()}, atol=1e-3)
    label(benchmark, f"input diversity of a stack {SHAPE}", side, peer=side.startswith("F."))
    benchmark(SIDES[side], images)


@pytest.mark.parametrize("side", SIDES)
def test_forward_and_backward(benchmark, side: str) -> None:
    images = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    upstream = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))
    assert_same({name: gradient(name, images, upstream) for name in SIDES}, atol=1e-3)
    label(
        benchmark, f"input diversity of a stack {SHAPE}, with its gradient", side, peer=side.startswith("F.")
    )
    benchmark(gradient, side, images, upstream)
