"""Channel-wise divergence: each channel's map as a distribution over positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..ops.checks import working

# Elements of a side worked on at once, whole channels: they stay in a core's cache.
_CHUNK = 1 << 17


def forward(student: Sequence[Tensor], teacher: Sequence[Tensor], tau: float) -> tuple[Tensor, Tensor]:
    """``[L, N]`` divergences, and ``[4, R]`` for the backward, R = N sum of C_l, level by level, ``[N, C_l]`` of each.

    Its rows: the student's maximum of every channel, the teacher's, and the logarithms of the two sums of
    ``exp((x - maximum) / tau)``. Kept apart, they lose nothing to maps far from zero.
    """
    n, device, dtype = student[0].shape[0], student[0].device, working(student, teacher)
    rows = [n * x.shape[1] for x in student]
    kl = torch.zeros(len(student), n, device=device, dtype=dtype)
    stats = torch.zeros(4, sum(rows), device=device, dtype=dtype)
    for level, found in enumerate(stats.split(rows, 1)):
        s, t, found = student[level], teacher[level], found.view(4, n, -1) if rows[level] else found
        for i, j in _chunks(s):
            a, b = (x[i, j].to(dtype).flatten(2) for x in (s, t))
            top_s, top_t = a.amax(2, keepdim=True), b.amax(2, keepdim=True)
            a, b = (a - top_s).div_(tau), (b - top_t).div_(tau)
            # The largest share is exp(0) over the sum.
            share = b.softmax(2)
            log_s, log_t = (-p.amax(2).log_() for p in (a.softmax(2), share))
            expected = b.sub_(a).mul_(share).sum(2)
            # Rounding may leave a divergence of almost nothing below zero.
            kl[level, i] += (expected - log_t + log_s).clamp_min_(0.0).sum(1)
            torch.stack([top_s[..., 0], top_t[..., 0], log_s, log_t], out=found[:, i, j])
    return kl, stats


def backward(
    grad: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor], stats: Tensor, tau: float
) -> list[Tensor]:
    """``g / tau (P_S - P_T)`` in each student map's dtype and layout."""
    n, dtype, out = student[0].shape[0], working(student, teacher), [torch.empty_like(s) for s in student]
    rows = [n * x.shape[1] for x in student]
    scale = (grad.to(dtype) / tau)[..., None, None]
    for level, found in enumerate(stats.split(rows, 1)):
        s, t = student[level], teacher[level]
        for i, j in _chunks(s):
            tops = found[:2].view(2, n, -1, 1)[:, i, j]
            p, q = (
                (x[i, j].to(dtype).flatten(2) - top).div_(tau).softmax(2)
                for x, top in zip((s, t), tops, strict=True)
            )
            out[level][i, j] = p.sub_(q).mul_(scale[level, i]).view_as(s[i, j])
    return out


def _chunks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Images and channels to take together; the whole map elsewhere than on a CPU; nothing of an empty one."""
    if x.numel() == 0:
        return
    n, c, h, w = x.shape
    images, channels = n, c
    if x.device.type == "cpu":
        channels = min(c, max(1, _CHUNK // (h * w)))
        images = max(1, _CHUNK // (channels * h * w)) if channels == c else 1
    for i in range(0, n, images):
        for j in range(0, c, channels):
            yield slice(i, i + images), slice(j, j + channels)
