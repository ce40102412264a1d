"""Distance of two pyramids after each channel is brought to mean 0 and standard deviation 1."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..ops.checks import working

# Rows of what the backward wants of every channel: dS = g (slope_s (S - mean_s) - slope_t (T - mean_t) - rest).
MEAN_S, MEAN_T, SLOPE_S, SLOPE_T, REST = range(5)
ROWS = 5
# Elements of both maps that stay in a core's cache between the passes.
_CHUNK = 1 << 17


def forward(
    student: Sequence[Tensor], teacher: Sequence[Tensor], eps: float, min_std: float
) -> tuple[Tensor, Tensor]:
    """Values ``[L]``, and ``[5, sum C]`` for ``backward``."""
    values, rows = [], []
    for s, t in zip(student, teacher, strict=True):
        parts = [_channels(s[:, part], t[:, part], eps, min_std) for part in _slices(s, t)]
        value = torch.cat([p[0] for p in parts])
        values.append(value.sum() / max(s.shape[1], 1))
        coefficients = torch.cat([p[1] for p in parts], 1)
        coefficients[SLOPE_S:] /= max(s.shape[1], 1)
        rows.append(coefficients)
    return torch.stack(values), torch.cat(rows, 1)


def backward(
    grad: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor], saved: Tensor
) -> list[Tensor]:
    """The gradient of every student map, in its dtype and layout."""
    out = []
    by_level = saved.split([s.shape[1] for s in student], 1)
    for g, s, t, rows in zip(grad.unbind(), student, teacher, by_level, strict=True):
        mean_s, mean_t, slope_s, slope_t, rest = (x[:, None, None] for x in rows)
        result = torch.empty_like(s)
        for part in _slices(s, t):
            d = s[:, part].to(saved.dtype).sub(mean_s[part]).mul_(slope_s[part] * g)
            d -= (t[:, part].to(saved.dtype) - mean_t[part]).mul_(slope_t[part] * g)
            result[:, part] = d.sub_(rest[part] * g)
        out.append(result)
    return out


def _slices(s: Tensor, t: Tensor) -> Iterator[slice]:
    """All channels at once, or few enough at a time on a CPU where each is a run of memory."""
    c, step = s.shape[1], max(s.shape[1], 1)
    if s.device.type == "cpu" and s.is_contiguous() and t.is_contiguous():
        step = max(1, _CHUNK * c // max(s.numel(), 1))
    for first in range(0, max(c, 1), step):
        yield slice(first, first + step)


def _centred(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Deviations from the channel's mean; the mean; what its rounding left out.

    Sums are those of differences from an element of the channel: exactly 0 where the channel is constant, and as
    precise for maps far from 0 as for maps around it.
    """
    pivot = x[:1, :, :1, :1].to(dtype)
    d = x.to(dtype) - pivot
    shift = d.mean((0, 2, 3), keepdim=True)
    mean = pivot + shift
    return d.sub_(shift), mean.flatten(), (pivot - mean + shift).flatten()


def _channels(s: Tensor, t: Tensor, eps: float, min_std: float) -> tuple[Tensor, Tensor]:
    """Of some channels, the value ``[C]`` and the five rows ``[5, C]``, not divided by the number of channels."""
    dtype, c = working([s], [t]), s.shape[1]
    count = s.numel() // c if c else 0
    if not count:
        return s.new_zeros(c, dtype=dtype), s.new_zeros((ROWS, c), dtype=dtype)
    d_s, mean_s, left_s = _centred(s, dtype)
    d_t, mean_t, left_t = _centred(t, dtype)
    ss, tt, st = ((a * b).sum((0, 2, 3)) for a, b in ((d_s, d_s), (d_t, d_t), (d_s, d_t)))
    free = max(count - 1, 1)
    std_s, std_t = (ss / free).sqrt(), (tt / free).sqrt()
    u_s, u_t = std_s + eps, std_t + eps
    value = (ss / (u_s * u_s) + tt / (u_t * u_t) - 2 * (st / (u_s * u_t))) / (2 * count)
    # Through the student's standard deviation. A constant channel deviates from its mean nowhere: any finite number.
    through = (ss / u_s - st / u_t) / (free * std_s.clamp_min(_tiny(dtype)))
    scale = 1 / (count * (std_s.clamp_min(min_std) + eps))
    slope_s, slope_t = (1 - through) * scale / u_s, scale / u_t
    rest = slope_s * left_s - slope_t * left_t
    return value.clamp_min(0), torch.stack([mean_s, mean_t, slope_s, slope_t, rest])


def _tiny(dtype: torch.dtype) -> float:
    return math.sqrt(torch.finfo(dtype).tiny)
