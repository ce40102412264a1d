"""Structural dissimilarity of a pyramid, forward and backward: the operation, kornia's ``ssim_loss``, and autograd compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.pairs import N, random_pair, step
from ikd_fast.kernels import ssim

WINDOW = 11
# channels, network input, timed rounds; levels have strides 8 to 128, all but the last at least 6 cells high
SIZES = {"small": (16, (256, 256), 10), "paper": (32, (800, 1344), 5)}


def gaussian() -> Tensor:
    x = torch.arange(WINDOW) - WINDOW // 2
    g = (-(x**2) / (2 * 1.5**2)).exp()
    return g / g.sum()


def smooth(x: Tensor, g: Tensor) -> Tensor:
    c, r = x.shape[1], len(g) // 2
    x = F.pad(x, (r, r, r, r), mode="reflect")
    x = F.conv2d(x, g.view(1, 1, -1, 1).expand(c, 1, -1, 1), groups=c)
    return F.conv2d(x, g.view(1, 1, 1, -1).expand(c, 1, 1, -1), groups=c)


def plain(s: Tensor, t: Tensor, g: Tensor) -> Tensor:
    """The formula, five filters by depthwise convolutions."""
    mu_s, mu_t = smooth(s, g), smooth(t, g)
    var_s, var_t = smooth(s * s, g) - mu_s**2, smooth(t * t, g) - mu_t**2
    cov = smooth(s * t, g) - mu_s * mu_t
    numerator = (2 * mu_s * mu_t + 1e-4) * (2 * cov + 9e-4)
    denominator = (mu_s**2 + mu_t**2 + 1e-4) * (var_s + var_t + 9e-4)
    return ((1 - numerator / (denominator + 1e-12)) / 2).clamp(0, 1).mean((1, 2, 3))


def eager(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    g = gaussian()
    return torch.stack([plain(s, t, g) for s, t in zip(student, teacher, strict=True)])


def kornia(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    from kornia.losses import ssim_loss

    pairs = zip(student, teacher, strict=True)
    return torch.stack([ssim_loss(s, t, WINDOW, reduction="none").mean((1, 2, 3)) for s, t in pairs])


FORMS = {
    "operation": ssim,
    "kornia": kornia,
    "autograd": eager,
    "autograd_compiled": torch.compile(eager, dynamic=False),
}


@pytest.fixture(scope="module", params=SIZES)
def problem(request):
    channels, image, _ = SIZES[request.param]
    return request.param, random_pair(channels, image, draw=torch.rand, above=WINDOW // 2)  # kornia's bound


@pytest.mark.parametrize("form", FORMS)
def test_ssim_forward_and_backward(benchmark, problem, form: str) -> None:
    if form == "kornia":
        pytest.importorskip("kornia", reason="kornia is compared with where it is installed")
    name, args = problem
    channels, size, rounds = SIZES[name]
    for got, want in zip(step(FORMS[form], *args), step(eager, *args), strict=True):
        # float32 variances of E[x^2] - E[x]^2: 6e-8 of 0.3 beside C2 = 9e-4; gradients are of size 1 / (C H W)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    benchmark.group = f"ssim forward+backward, {N}x{channels} channels, input {size}"
    benchmark.pedantic(step, args=(FORMS[form], *args), rounds=rounds, warmup_rounds=1)
