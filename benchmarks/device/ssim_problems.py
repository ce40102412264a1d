"""Structural dissimilarity of two pyramids, forward and backward. Peers: five depthwise filters in PyTorch, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ikd_fast.kernels import ssim

from .problem import Problem, Scale
from .pyramids import pair_problem

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def _smooth(x: Tensor) -> Tensor:
    """Gaussian means, edges reflected; the largest odd window that fits on a small map."""
    r, c = min(WINDOW // 2, x.shape[2] - 1, x.shape[3] - 1), x.shape[1]
    g = torch.exp(-(torch.arange(-r, r + 1, device=x.device, dtype=x.dtype) ** 2) / (2 * SIGMA**2))
    g = g / g.sum()
    x = F.pad(x, (r, r, r, r), mode="reflect")
    x = F.conv2d(x, g.view(1, 1, -1, 1).expand(c, 1, -1, 1), groups=c)
    return F.conv2d(x, g.view(1, 1, 1, -1).expand(c, 1, 1, -1), groups=c)


def plain_ssim(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    values = []
    for pair in zip(student, teacher, strict=True):
        s, t = (x if x.dtype == torch.float64 else x.float() for x in pair)
        mu_s, mu_t = _smooth(s), _smooth(t)
        var_s, var_t = _smooth(s * s) - mu_s**2, _smooth(t * t) - mu_t**2
        cov = _smooth(s * t) - mu_s * mu_t
        numerator = (2 * mu_s * mu_t + C1) * (2 * cov + C2)
        denominator = (mu_s**2 + mu_t**2 + C1) * (var_s + var_t + C2)
        values.append(((1 - numerator / denominator) / 2).clamp(0, 1).mean((1, 2, 3)))
    return torch.stack(values)


def ssim_problems(
    scale: Scale, batch: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Iterator[Problem]:
    def ours(s: Sequence[Tensor], t: Sequence[Tensor]) -> Tensor:
        return ssim(s, t, window=WINDOW, sigma=SIGMA, backend=backend)

    yield pair_problem(
        "ssim",
        ours,
        plain_ssim,
        scale,
        batch,
        dtype,
        device,
        work="forward and backward, window 11",
        squash=torch.sigmoid,
        tolerance=1e-4,  # variances are differences of float32 means of squares
        targets=(5.0, 1.5),
    )
