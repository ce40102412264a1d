"""sign_step on the CPU beside the same step in plain PyTorch, of normalised images and of images in 0..1."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.comparison import TIMED, assert_same, label
from ikd_fast.kernels import sign_step

pytestmark = pytest.mark.benchmark(**TIMED)

SHAPE, EPS, STEP = (2, 3, 800, 1344), 8.0, 2.0
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
UNITS = {
    "normalised": dict(
        step=[STEP / s for s in STD],
        radius=[EPS / s for s in STD],
        low=[-m / s for m, s in zip(MEAN, STD, strict=True)],
        high=[(255 - m) / s for m, s in zip(MEAN, STD, strict=True)],
    ),
    "0..1": dict(step=[STEP / 255] * 3, radius=[EPS / 255] * 3, low=[0.0] * 3, high=[1.0] * 3),
}


def plain(delta: Tensor, gradient: Tensor, images: Tensor, **units: Any) -> Tensor:
    """The step of torchattacks, for any units: the perturbation of clamp(x + clamp(delta + step))."""
    step, radius, low, high = (
        torch.tensor(units[k]).view(3, 1, 1) for k in ("step", "radius", "low", "high")
    )
    delta = torch.clamp(delta + step * gradient.sign(), min=-radius, max=radius)
    return torch.clamp(images + delta, min=low, max=high) - images


SIDES: dict[str, Callable[..., Tensor]] = {"sign_step": sign_step, "PyTorch": plain}


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("side", SIDES)
def test_step(benchmark, side: str, units: str) -> None:
    numbers, g = UNITS[units], torch.Generator().manual_seed(0)
    low, high = (torch.tensor(numbers[k]).view(3, 1, 1) for k in ("low", "high"))
    images = low + torch.rand(SHAPE, generator=g) * (high - low)
    delta = (torch.rand(SHAPE, generator=g) * 2 - 1) * torch.tensor(numbers["radius"]).view(3, 1, 1)
    gradient = torch.randn(SHAPE, generator=g)
    assert_same({name: run(delta, gradient, images, **numbers) for name, run in SIDES.items()}, atol=1e-6)
    label(benchmark, f"a signed step of a stack {SHAPE}, {units}", side, peer=side == "PyTorch")
    benchmark(functools.partial(SIDES[side], delta, gradient, images, **numbers))
