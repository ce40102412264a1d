"""add_noise on a normalised stack on the CPU, forward and with its gradient, beside noise of plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.comparison import TIMED, label
from ikd_fast.kernels import add_noise

pytestmark = pytest.mark.benchmark(**TIMED)

SHAPE, SIGMA = (2, 3, 800, 1344), 20.4
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
GREY = [1 / s for s in STD]
LOW, HIGH = ([(v - m) / s for m, s in zip(MEAN, STD, strict=True)] for v in (0.0, 255.0))


def keyed(rng: str):
    def run(images: Tensor) -> Tensor:
        sigma, ids = torch.full((SHAPE[0],), SIGMA), torch.arange(SHAPE[0])
        units = {"grey_level": GREY, "low": LOW, "high": HIGH}
        return add_noise(images, sigma, ids, seed=0, epoch=0, rng=rng, **units)

    return run


def plain(images: Tensor) -> Tensor:
    grey, low, high = (torch.tensor(v).view(3, 1, 1) for v in (GREY, LOW, HIGH))
    return (images + torch.randn_like(images) * (SIGMA * grey)).clamp(low, high)


SIDES = {"add_noise, philox": keyed("philox"), "add_noise, torch": keyed("torch"), "PyTorch, no keys": plain}


def check(side: str, images: Tensor) -> None:
    """Far from the bounds: five standard errors of the mean and of the deviation of two million normals a channel."""
    noise = (SIDES[side](images) - images) * torch.tensor(STD).view(3, 1, 1)
    for channel in noise.unbind(1):
        assert abs(channel.mean().item()) < 5 * SIGMA / channel.numel() ** 0.5
        assert abs(channel.std().item() / SIGMA - 1) < 5 / (2 * channel.numel()) ** 0.5


@pytest.mark.parametrize("side", SIDES)
def test_forward(benchmark, side: str) -> None:
    images = torch.zeros(SHAPE)
    check(side, images)
    label(benchmark, f"noise on a stack {SHAPE}", side, peer=side.startswith("PyTorch"))
    benchmark(SIDES[side], images)


@pytest.mark.parametrize("side", SIDES)
def test_forward_and_backward(benchmark, side: str) -> None:
    images = torch.zeros(SHAPE, requires_grad=True)
    upstream = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))

    def step() -> Tensor:
        return torch.autograd.grad(SIDES[side](images), images, upstream)[0]

    check(side, images.detach())
    # At 0 nothing but noise beyond five sigma is clamped.
    assert (step() == upstream).double().mean() > 0.99999
    label(benchmark, f"noise on a stack {SHAPE}, with its gradient", side, peer=side.startswith("PyTorch"))
    benchmark(step)
