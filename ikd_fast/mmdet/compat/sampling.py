"""What RoIAlign and the deformable convolutions share: bilinear samples of a feature map as weighted rows of a table.

A map [N, C, H, W] becomes a table of one row per pixel (:func:`pixel_rows`), and a sample a sum of four rows. That is
``embedding_bag`` with per-sample weights, which reads each row once and stores nothing in between: no copy of the four
neighbours of every sample is ever held.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def outside_autocast(operator: Callable[P, R]) -> Callable[P, R]:
    """Run an operator in the dtype of its tensors: mmcv calls it under autocast, which would round its products."""

    @functools.wraps(operator)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return operator(*args, **kwargs)

    return run


def working_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for the rest: half types are computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def pixel_rows(maps: Tensor, parts: int = 1) -> Tensor:
    """[N, C, H, W] -> [N * parts * H * W, C / parts]: one row per pixel of every part of the channels."""
    n, c, h, w = maps.shape
    rows = maps.reshape(n, parts, c // parts, h, w).permute(0, 1, 3, 4, 2)
    return rows.reshape(n * parts * h * w, c // parts)


def bilinear_corners(y: Tensor, x: Tensor, inside: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four pixels around each point, as positions in a map, and their weights; differentiable in ``y, x``.

    Args:
        y, x: coordinates of any shape S; pixel centres are at whole numbers.
        inside: bool S; points outside weigh nothing.
        height, width: of the map. Corners beyond its border weigh nothing (zero padding).

    Returns:
        int64 [*S, 4], weights [*S, 4].
    """
    y = torch.where(inside, y, 0)
    x = torch.where(inside, x, 0)
    top, left = y.detach().floor(), x.detach().floor()
    down, right = y - top, x - left
    rows = torch.stack([top, top + 1], -1).long()
    columns = torch.stack([left, left + 1], -1).long()
    row_weight = torch.stack([1 - down, down], -1) * ((rows >= 0) & (rows < height) & inside[..., None])
    column_weight = torch.stack([1 - right, right], -1) * ((columns >= 0) & (columns < width))
    index = rows.clamp(0, height - 1)[..., :, None] * width + columns.clamp(0, width - 1)[..., None, :]
    weight = row_weight[..., :, None] * column_weight[..., None, :]
    return index.flatten(-2), weight.flatten(-2)


def weighted_rows(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """``sum_k weight[p, k] * table[index[p, k]]``: [P, C] from a table [T, C] and index, weight [P, K]."""
    return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")


def blocks(total: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` (at least one) that cover ``range(total)``."""
    size = max(1, size)
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
