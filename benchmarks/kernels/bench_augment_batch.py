"""augment_batch on the CPU: crop, flip, normalise, pad and stack beside plain PyTorch, and what the noise adds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.comparison import TIMED, assert_same, label
from ikd_fast.kernels import augment_batch

pytestmark = pytest.mark.benchmark(**TIMED)

N, HEIGHT, WIDTH, SIGMA = 2, 800, 1333, 20.4
SIZE = (800, 1344)
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CROPS, WHOLE = [(50, 30, 1250, 750), (10, 100, 1200, 790)], [(0, 0, WIDTH, HEIGHT)] * N
FLIPS = [False, True]


def images() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=g) for _ in range(N)]


def operation(given: list[Tensor], windows: list[tuple], sigma: float, rng: str = "philox") -> Tensor:
    return augment_batch(
        given,
        torch.tensor(windows),
        torch.tensor(FLIPS),
        torch.full((N,), sigma),
        torch.arange(N),
        seed=0,
        epoch=0,
        swap_channels=True,
        mean=MEAN,
        std=STD,
        size=SIZE,
        rng=rng,
    )


def chain(given: list[Tensor], windows: list[tuple], sigma: float) -> Tensor:
    """A step at a time; the noise is not keyed."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    out = torch.zeros(N, 3, *SIZE)
    for row, image, (x0, y0, x1, y1), flip in zip(out, given, windows, FLIPS, strict=True):
        x = image[y0:y1, x0:x1].permute(2, 0, 1).flip(0)
        x = (x.flip(-1) if flip else x).float()
        if sigma:
            x = (x + (sigma * torch.randn_like(x)).round()).clamp(0, 255)
        row[:, : y1 - y0, : x1 - x0] = (x - mean) / std
    return out


@pytest.mark.parametrize("side", ["augment_batch", "PyTorch"])
def test_crop_flip_normalise_pad_stack(benchmark, side: str) -> None:
    given = images()
    run = {"augment_batch": operation, "PyTorch": chain}
    # (p - mean) / std of the same numbers
    assert_same({name: form(given, CROPS, 0.0) for name, form in run.items()}, atol=1e-6)
    label(benchmark, f"crop, flip, normalise, pad, {N} images {HEIGHT}x{WIDTH}", side, peer=side == "PyTorch")
    benchmark(run[side], given, CROPS, 0.0)


@pytest.mark.parametrize("side", ["augment_batch, philox", "augment_batch, torch", "PyTorch, no keys"])
def test_noise_normalise_pad_stack(benchmark, side: str) -> None:
    given = [x // 4 + 96 for x in images()]  # nothing is clamped

    def run() -> Tensor:
        if side.startswith("PyTorch"):
            return chain(given, WHOLE, SIGMA)
        return operation(given, WHOLE, SIGMA, side.split(", ")[1])

    noise = (run() - chain(given, WHOLE, 0.0))[:, :, :HEIGHT, :WIDTH] * torch.tensor(STD).view(3, 1, 1)
    # Six million values: five standard errors of a mean are 0.04, of a deviation 0.03; rounding adds 1/12 to the variance.
    assert abs(noise.mean().item()) < 0.05
    assert abs(noise.std().item() - (SIGMA**2 + 1 / 12) ** 0.5) < 0.05
    label(
        benchmark,
        f"noise, normalise, pad, {N} images {HEIGHT}x{WIDTH}",
        side,
        peer=side.startswith("PyTorch"),
    )
    benchmark(run)
