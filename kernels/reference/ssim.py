"""Structural dissimilarity of two pyramids: the mean of (1 - SSIM) / 2 for each level and image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.checks import working
from .precision import full, no_autocast

K1, K2 = 0.01, 0.03
# On the denominator, as kornia has it; in units of data_range^4.
EPS = 1e-12
# Elements computed together on a CPU. At 2 x 32 channels of 800x1344, forward and backward, 159 ms of one core; with
# 2^15 the calls themselves take 290, with 2^19 the maps leave the cache: 174.
_CHUNK = 1 << 17


def taps(window: int, sigma: float, height: int, width: int) -> list[float]:
    """The Gaussian's taps, of sum 1: ``window`` of them, or as many as reflection allows in a small map.

    >>> [round(x, 4) for x in taps(11, 1.5, 2, 9)]  # 3 taps: 1 must be less than the height
    [0.3078, 0.3844, 0.3078]
    """
    radius = min(window // 2, min(height, width) - 1)
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)]
    total = sum(weights)
    return [x / total for x in weights]


def _correlate(x: Tensor, weights: Sequence[float], dim: int) -> Tensor:
    """Sums of ``len(weights)`` neighbours along ``dim``, where they all exist."""
    size = x.shape[dim] - len(weights) + 1
    out = x.narrow(dim, 0, size) * weights[0]
    for i, weight in enumerate(weights[1:], 1):
        out.add_(x.narrow(dim, i, size), alpha=weight)
    return out


def smooth(x: Tensor, weights: Sequence[float]) -> Tensor:
    """Planes ``[K, H, W]`` filtered along rows and columns, reflected at the border."""
    r = len(weights) // 2
    return _correlate(_correlate(F.pad(x, (r, r, r, r), mode="reflect"), weights, 1), weights, 2)


def smooth_adjoint(x: Tensor, weights: Sequence[float]) -> Tensor:
    """The transpose of ``smooth``: what fell on the reflected border goes back to where it came from."""
    r = len(weights) // 2
    for dim in (1, 2):
        wide = _correlate(F.pad(x, (0, 0, 2 * r, 2 * r) if dim == 1 else (2 * r, 2 * r)), weights, dim)
        size = x.shape[dim]
        x = wide.narrow(dim, r, size)
        if r:
            x.narrow(dim, 1, r).add_(wide.narrow(dim, 0, r).flip(dim))
            x.narrow(dim, size - 1 - r, r).add_(wide.narrow(dim, size + r, r).flip(dim))
    return x


class _Statistics(NamedTuple):
    """Local statistics of some planes. Means are of planes from which the plane's own mean was taken."""

    s: Tensor  # the planes less their means
    t: Tensor
    mean_s: Tensor  # local means of s and t
    mean_t: Tensor
    whole_s: Tensor  # local means of the planes themselves
    gap: Tensor  # local variance of S - T
    contrast: Tensor  # 2 cov + C2
    luminance: Tensor  # mu_S^2 + mu_T^2 + C1
    shift: Tensor  # mu_S - mu_T
    denominator: Tensor

    @property
    def loss(self) -> Tensor:
        """(1 - SSIM) / 2, from differences: it keeps its digits where S is close to T."""
        numerator = self.luminance * self.gap + self.contrast * self.shift.square() + EPS
        return numerator.div_(self.denominator).mul_(0.5)


def _statistics(s: Tensor, t: Tensor, weights: Sequence[float]) -> _Statistics:
    # E[x^2] - E[x]^2 loses the digits that a plane's constant part takes up.
    base_s, base_t = (x.mean((1, 2), keepdim=True) for x in (s, t))
    s, t = s - base_s, t - base_t
    mean_s, mean_t = smooth(s, weights), smooth(t, weights)
    gap = smooth((s - t).square_(), weights).sub_((mean_s - mean_t).square_())
    contrast = smooth(s * t, weights).sub_(mean_s * mean_t).mul_(2.0).add_(K2**2)
    whole_s, whole_t = mean_s + base_s, mean_t + base_t
    luminance = whole_s.square() + whole_t.square() + K1**2
    denominator = luminance * (contrast + gap) + EPS
    shift = (mean_s - mean_t).add_(base_s - base_t)
    return _Statistics(s, t, mean_s, mean_t, whole_s, gap, contrast, luminance, shift, denominator)


def _gradient(x: _Statistics, weights: Sequence[float]) -> Tensor:
    """Of the sum of the planes' clamped losses, with respect to S."""
    loss = x.loss
    inverse = x.denominator.reciprocal()
    inverse.masked_fill_((loss < 0) | (loss > 1), 0.0)  # NaN stays
    to_square = x.luminance * (1.0 - 2.0 * loss) * inverse  # twice the slope in E[(S - T)^2]
    to_product = (x.shift.square() - 2.0 * loss * x.luminance) * inverse
    to_mean = x.whole_s * x.gap - x.luminance * (x.mean_s - x.mean_t) - x.mean_t * x.shift.square()
    to_mean += x.contrast * x.shift
    to_mean -= 2.0 * loss * (x.whole_s * (x.contrast + x.gap) - x.luminance * x.mean_s)
    to_mean *= inverse
    out = smooth_adjoint(to_mean, weights)
    out += smooth_adjoint(to_square, weights).mul_(x.s - x.t)
    out += smooth_adjoint(to_product, weights).mul_(x.t)
    return out


def _chunks(x: Tensor) -> Iterator[tuple[int, slice]]:
    """(image, channels) whose planes are computed together."""
    n, c, h, w = x.shape
    step = max(1, _CHUNK // (h * w)) if x.device.type == "cpu" else c
    for i in range(n):
        for begin in range(0, c, step):
            yield i, slice(begin, begin + step)


def _scaled(x: Tensor, image: int, channels: slice, dtype: torch.dtype, data_range: float) -> Tensor:
    x = full(x[image, channels]).to(dtype)
    return x if data_range == 1.0 else x / data_range


def forward(
    student: Sequence[Tensor], teacher: Sequence[Tensor], window: int, sigma: float, data_range: float
) -> Tensor:
    """``[L, N]``: means over C, H, W of ``clamp((1 - SSIM) / 2, 0, 1)``."""
    dtype = working(student, teacher)
    rows = []
    for s, t in zip(student, teacher, strict=True):
        weights = taps(window, sigma, *s.shape[2:])
        sums = torch.zeros(s.shape[0], dtype=dtype, device=s.device)
        with no_autocast(s):
            for i, channels in _chunks(s):
                a, b = (_scaled(x, i, channels, dtype, data_range) for x in (s, t))
                sums[i] += _statistics(a, b, weights).loss.clamp_(0.0, 1.0).sum()
        rows.append(sums / s[0].numel() if len(s) else sums)
    return torch.stack(rows)


def backward(
    grad: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    window: int,
    sigma: float,
    data_range: float,
) -> list[Tensor]:
    """The gradient of every student map, in its dtype and layout."""
    dtype = working(student, teacher)
    out = []
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        weights = taps(window, sigma, *s.shape[2:])
        o = torch.empty_like(s)
        with no_autocast(s):
            for i, channels in _chunks(s):
                a, b = (_scaled(x, i, channels, dtype, data_range) for x in (s, t))
                found = _gradient(_statistics(a, b, weights), weights)
                scale = grad[level, i].to(dtype) / (s[0].numel() * data_range)
                o[i, channels] = found.mul_(scale).to(s.dtype)
        out.append(o)
    return out
