"""Means of maps and of powers of their magnitudes over a pyramid: the operation and its gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import check_backend, room
from .checks import FLOATING
from .once import differentiable_once

STEM = "attention_stats"
OVER = ("both", "channels", "positions")


class AttentionStats(NamedTuple):
    """Means of every level; a list is empty where ``over`` left it out.

    ``spatial`` ``[N, H, W]``: over channels, of f(X). ``spatial_mean``: over channels, of X. ``channel`` ``[N, C]``:
    over positions, of f(X). ``channel_mean``: over positions, of X.
    """

    spatial: list[Tensor]
    spatial_mean: list[Tensor]
    channel: list[Tensor]
    channel_mean: list[Tensor]


def _forward(
    maps: list[Tensor], p: float, positive: bool, spatial: bool, channel: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = room(STEM, backend, maps[0].device, maps[0].dtype)
    out: tuple[Tensor, Tensor, Tensor, Tensor] = chosen.forward(maps, p, positive, spatial, channel)
    return out


def _backward(
    grad_spatial: Tensor | None,
    grad_spatial_mean: Tensor | None,
    grad_channel: Tensor | None,
    grad_channel_mean: Tensor | None,
    maps: list[Tensor],
    p: float,
    positive: bool,
    backend: str,
) -> list[Tensor]:
    grads = grad_spatial, grad_spatial_mean, grad_channel, grad_channel_mean
    out: list[Tensor] = room(STEM, backend, maps[0].device, maps[0].dtype).backward(*grads, maps, p, positive)
    return out


# Registered for torch.compile and export. Eager mode calls the same functions through _Means, which costs a
# fraction of the dispatcher's time for tensor lists.
_op = torch.library.custom_op("ikd_fast::attention_stats", mutates_args=())(_forward)
_op_backward = torch.library.custom_op("ikd_fast::attention_stats_backward", mutates_args=())(_backward)


@_op.register_fake
def _(maps, p, positive, spatial, channel, backend):
    dtype = torch.float64 if maps[0].dtype == torch.float64 else torch.float32
    positions = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in maps) if spatial else 0
    rows = sum(x.shape[0] * x.shape[1] for x in maps) if channel else 0
    return tuple(maps[0].new_empty((size,), dtype=dtype) for size in (positions, positions, rows, rows))


@_op_backward.register_fake
def _(grad_spatial, grad_spatial_mean, grad_channel, grad_channel_mean, maps, p, positive, backend):
    return [torch.empty_like(x) for x in maps]


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    maps, ctx.p, ctx.positive, ctx.spatial, ctx.channel, ctx.backend = inputs
    # A mean that nothing asks a gradient of costs none; without f's means the backward reads no map.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*maps)


def _wanted(
    ctx: Any, a: Tensor | None, b: Tensor | None, c: Tensor | None, d: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the four rows; none of a row that was left out."""
    over_channels = (a, b) if ctx.spatial else (None, None)
    return (*over_channels, c, d) if ctx.channel else (*over_channels, None, None)


def _gradient(ctx: Any, *grads: Tensor | None) -> tuple:
    maps = list(ctx.saved_tensors)
    out = _op_backward(*_wanted(ctx, *grads), maps, ctx.p, ctx.positive, ctx.backend)
    return out, None, None, None, None, None


_op.register_autograd(_gradient, setup_context=_setup)


class _Means(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, p: float, positive: bool, spatial: bool, channel: bool, backend: str, *maps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _setup(ctx, (list(maps), p, positive, spatial, channel, backend), ())
        return _forward(list(maps), p, positive, spatial, channel, backend)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        maps = list(ctx.saved_tensors)  # once: checkpointing refuses a second reading
        out = _backward(*_wanted(ctx, *grads), maps, ctx.p, ctx.positive, ctx.backend)
        return None, None, None, None, None, *out


def _check(op: str, maps: Sequence[Tensor]) -> None:
    """At least one map, ``[N, C, H, W]`` of one N, floating dtype and device."""
    if not maps:
        raise ValueError(f"{op}: expected a pyramid of at least one map, got none")
    first = maps[0]
    for i, x in enumerate(maps):
        if x.ndim != 4 or x.shape[0] != first.shape[0]:
            expected = "N" if first.ndim != 4 else str(first.shape[0])
            raise ValueError(f"{op}, level {i}: expected a map [{expected},C,H,W], got {tuple(x.shape)}")
        if x.dtype not in FLOATING or x.dtype != first.dtype:
            wanted = first.dtype if first.dtype in FLOATING else "a floating dtype (fp16, bf16, fp32, fp64)"
            raise TypeError(f"{op}, level {i}: expected {wanted}, got {x.dtype}")
        if x.device != first.device:
            raise ValueError(
                f"{op}, level {i}: expected every map on {first.device}, got {x.device}; move all to one device"
            )


def attention_stats(
    maps: Sequence[Tensor],
    *,
    p: float = 1.0,
    positive: bool = False,
    over: str = "both",
    backend: str = "auto",
) -> AttentionStats:
    """Means over channels and over positions of a pyramid: of ``f(X)`` and of X itself, in one reading.

    ``f(x) = |x|^p``, or ``max(x, 0)^p`` where ``positive``. These are what the attention maps of attention
    transfer (NAD), of FGD and FKD, and activated channel maps (ACM) are made of::

        spatial[l][n, h, w] = 1 / C   sum_c  f(X_l)      spatial_mean: the same of X_l
        channel[l][n, c]    = 1 / HW  sum_hw f(X_l)      channel_mean: the same of X_l

    Args:
        maps: ``[N, C, H, W]``, fp16, bf16, fp32 (summed in float32) or fp64, contiguous, channels_last or any
            strides, each level of its own C, H, W; one dtype. ``|x|^p`` must fit in float32: past it values are inf.
        p: exponent >= 1.
        positive: count max(x, 0) in place of \\|x\\| in f.
        over: ``"channels"`` leaves ``channel`` and ``channel_mean`` empty, ``"positions"`` the other two.
        backend: ``"auto"`` (Triton on CUDA, else the reference), ``"triton"`` or ``"reference"``.

    The gradient, ``f'(X) (g_spatial / C + g_channel / HW) + g_spatial_mean / C + g_channel_mean / HW`` with f'(0)
    = 0, comes in the maps' dtype and layout; it cannot be differentiated again. Repeats give the same bits.

    Returns:
        ``AttentionStats``, float32 (float64 of float64). A mean over nothing is 0.

    Raises:
        ValueError, TypeError: p < 1, maps of other rank, batch, dtype or device than level 0's, in Triton an image
            of 2**31 elements: before any launch.

    >>> stats = attention_stats([torch.tensor([[[[3.0, -1.0]], [[-1.0, -1.0]]]])])
    >>> stats.spatial[0].tolist(), stats.spatial_mean[0].tolist()
    ([[[2.0, 1.0]]], [[[1.0, -1.0]]])
    >>> stats.channel[0].tolist(), stats.channel_mean[0].tolist()
    ([[2.0, 1.0]], [[1.0, -1.0]])
    """
    check_backend(STEM, backend)
    if isinstance(p, bool) or not isinstance(p, int | float) or not math.isfinite(p) or p < 1:
        raise ValueError(f"{STEM}: the exponent p must be a finite number >= 1, got {p!r}")
    if over not in OVER:
        raise ValueError(f"{STEM}: over must be one of {', '.join(map(repr, OVER))}, got {over!r}")
    _check(STEM, maps)
    options = float(p), bool(positive), over != "positions", over != "channels", backend
    if torch.compiler.is_compiling():
        rows = _op(list(maps), *options)
    else:
        rows = _Means.apply(*options, *maps)
    n = maps[0].shape[0]
    positions: list[tuple[int, ...]] = [(n, x.shape[2], x.shape[3]) for x in maps] if options[2] else []
    channels: list[tuple[int, ...]] = [(n, x.shape[1]) for x in maps] if options[3] else []
    shapes = (positions, positions, channels, channels)
    return AttentionStats(*(_levels(row, shape) for row, shape in zip(rows, shapes, strict=True)))


def _levels(row: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    if not shapes:
        return []
    parts = row.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
