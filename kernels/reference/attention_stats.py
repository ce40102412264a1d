"""Means of a map and of powers of its magnitudes, over channels and over positions: what attention maps are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .precision import full, no_autocast

# Elements of a map worked on at once, 1 MiB in float32: all four means are taken while they lie in a CPU's cache.
_BLOCK_BUDGET = 1 << 18


def forward(
    maps: Sequence[Tensor], p: float, positive: bool, spatial: bool, channel: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means over channels of f(X) and of X, each ``[N, H, W]`` of level after level in one row; over positions the
    same, ``[N, C]``. f(x) = |x|^p, or max(x, 0)^p where ``positive``. A row not asked for is empty; a mean over
    nothing is 0.
    """
    like = full(maps[0].new_empty(0))
    positions = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in maps) if spatial else 0
    rows = sum(x.shape[0] * x.shape[1] for x in maps) if channel else 0
    over_channels = [like.new_zeros(positions) for _ in range(2)]
    over_positions = [like.new_zeros(rows) for _ in range(2)]
    with no_autocast(like):
        for level, images, of_channels, of_positions in _groups(maps):
            x = maps[level][images].flatten(2)
            n, c, count = x.shape
            for block in _blocks(x):
                b = x[block].to(like.dtype)
                for row, value in enumerate((_power(b, p, positive), b)):
                    if spatial:
                        over_channels[row][of_positions].view(n, count)[:, block[2]] += value.sum(1)
                    if channel:
                        over_positions[row][of_channels].view(n, c)[:, block[1]] += value.sum(2)
            for row in (0, 1):
                if spatial:
                    over_channels[row][of_positions] /= max(c, 1)
                if channel:
                    over_positions[row][of_channels] /= max(count, 1)
    return over_channels[0], over_channels[1], over_positions[0], over_positions[1]


def backward(
    grad_spatial: Tensor | None,
    grad_spatial_mean: Tensor | None,
    grad_channel: Tensor | None,
    grad_channel_mean: Tensor | None,
    maps: Sequence[Tensor],
    p: float,
    positive: bool,
) -> list[Tensor]:
    """``f'(X) (g_spatial / C + g_channel / HW) + g_spatial_mean / C + g_channel_mean / HW`` in each map's dtype and
    layout; None counts as 0."""
    grads = [torch.empty_like(x) for x in maps]
    work = full(maps[0].new_empty(0)).dtype
    with no_autocast(maps[0]):
        for level, images, channels, positions in _groups(maps):
            x, out = maps[level][images].flatten(2), grads[level][images]
            grad = out.flatten(2)
            sides = (grad_spatial, grad_channel), (grad_spatial_mean, grad_channel_mean)
            power, mean = (_scaled(*side, positions, channels, x.shape) for side in sides)
            for block in _blocks(x):
                total = _outer(mean, block)
                factor = _outer(power, block)
                if factor is not None:
                    slope = _slope(x[block].to(work), p, positive).mul_(factor)
                    total = slope if total is None else slope.add_(total)
                grad[block] = 0.0 if total is None else total
            if grad.data_ptr() != out.data_ptr():  # rows with gaps between them cannot be viewed as one
                out.copy_(grad.view(out.shape))
    return grads


def _groups(maps: Sequence[Tensor]) -> Iterator[tuple[int, slice, slice, slice]]:
    """Level, as many of its images as make a block, and their places among all channels and all positions."""
    channel = position = 0
    for level, x in enumerate(maps):
        n, c, count = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        step = n if x.device.type != "cpu" else max(1, _BLOCK_BUDGET // max(c * count, 1))
        for i in range(0, n, max(step, 1)):
            images = slice(i, min(n, i + step))
            size = images.stop - i
            yield (
                level,
                images,
                slice(channel, channel + size * c),
                slice(position, position + size * count),
            )
            channel, position = channel + size * c, position + size * count


def _blocks(x: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Runs of memory of ``[G, C, P]``: of whole channels, or of whole positions where channels are innermost."""
    _, c, p = x.shape
    every = slice(None)
    if x.device.type != "cpu" or x.numel() <= _BLOCK_BUDGET:
        if x.numel():
            yield every, every, every
        return
    rows = x.stride(2) == 1 or p == 1
    size, other = (c, p) if rows else (p, c)
    step = max(1, _BLOCK_BUDGET // other)
    for k in range(0, size, step):
        block = slice(k, min(size, k + step))
        yield (every, block, every) if rows else (every, every, block)


def _power(x: Tensor, p: float, positive: bool) -> Tensor:
    a = x.clamp_min(0.0) if positive else x.abs()
    return a if p == 1 else a.square_() if p == 2 else a.pow_(p)


def _slope(x: Tensor, p: float, positive: bool) -> Tensor:
    """f'(x), 0 at 0; a new tensor."""
    x = x.clamp_min(0.0) if positive else x
    if p == 1:
        return x.sign()
    return x * 2.0 if p == 2 else x.abs().pow_(p - 1).mul_(p).mul_(x.sign())


def _scaled(
    spatial: Tensor | None, channel: Tensor | None, positions: slice, channels: slice, shape: torch.Size
) -> tuple[Tensor | None, Tensor | None]:
    """For every element of ``[G, C, P]``: ``[G, 1, P]`` and ``[G, C, 1]``, over what was counted."""
    n, c, p = shape
    return (
        None if spatial is None else (spatial[positions] / max(c, 1)).view(n, 1, p),
        None if channel is None else (channel[channels] / max(p, 1)).view(n, c, 1),
    )


def _outer(parts: tuple[Tensor | None, Tensor | None], block: tuple[slice, slice, slice]) -> Tensor | None:
    spatial, channel = parts
    row = None if spatial is None else spatial[:, :, block[2]]
    column = None if channel is None else channel[:, block[1]]
    if row is None or column is None:
        return column if row is None else row
    return row + column
