"""Divergence of two pyramids' channels as distributions over positions: the operation and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import check_backend, room
from .checks import check_pyramids, check_temperature, savable, working
from .once import differentiable_once

STEM = "channel_kl"


def _forward(student: list[Tensor], teacher: list[Tensor], tau: float, backend: str) -> tuple[Tensor, Tensor]:
    chosen = room(STEM, backend, student[0].device, working(student, teacher))
    out: tuple[Tensor, Tensor] = chosen.forward(student, teacher, tau)
    return out


def _backward(
    grad: Tensor, student: list[Tensor], teacher: list[Tensor], stats: Tensor, tau: float, backend: str
) -> list[Tensor]:
    chosen = room(STEM, backend, student[0].device, working(student, teacher))
    out: list[Tensor] = chosen.backward(grad, student, teacher, stats, tau)
    return out


# Registered for torch.compile and export. Eager mode calls the same functions through _Divergence, which costs
# a fraction of the dispatcher's time for tensor lists.
_op = torch.library.custom_op("ikd_fast::channel_kl", mutates_args=())(_forward)
_op_backward = torch.library.custom_op("ikd_fast::channel_kl_backward", mutates_args=())(_backward)


@_op.register_fake
def _(student, teacher, tau, backend):
    n, dtype = student[0].shape[0], working(student, teacher)
    rows = n * sum(s.shape[1] for s in student)
    shapes = ((len(student), n), (4, rows))
    return tuple(student[0].new_empty(shape, dtype=dtype) for shape in shapes)


@_op_backward.register_fake
def _(grad, student, teacher, stats, tau, backend):
    return [torch.empty_like(s) for s in student]


def _saved(ctx: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
    *maps, stats = ctx.saved_tensors  # once: checkpointing refuses a second reading
    return maps[: ctx.levels], maps[ctx.levels :], stats


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    student, teacher, ctx.tau, ctx.backend = inputs
    ctx.levels = len(student)
    ctx.save_for_backward(*student, *teacher, output[1])


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    grads = _op_backward(grad, *_saved(ctx), ctx.tau, ctx.backend)
    return grads, [None] * ctx.levels, None, None


_op.register_autograd(_gradient, setup_context=_setup)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tau: float, backend: str, levels: int, *maps: Tensor) -> Tensor:
        out, stats = _forward(list(maps[:levels]), list(maps[levels:]), tau, backend)
        ctx.tau, ctx.backend, ctx.levels = tau, backend, levels
        ctx.save_for_backward(*maps, stats)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grads = _backward(grad, *_saved(ctx), ctx.tau, ctx.backend)
        return (None, None, None, *grads, *[None] * ctx.levels)


def channel_kl(
    student: Sequence[Tensor], teacher: Sequence[Tensor], tau: float = 1.0, *, backend: str = "auto"
) -> Tensor:
    """``out[l, n] = sum over c of KL(P_T || P_S)``, ``P_X = softmax over h, w of X_l[n, c] / tau``: ``[levels, N]``.

    float32 (float64 of float64). Not scaled: CWD is ``tau^2 / (N C)`` times the sum over images. Zero where S - T
    is constant in every channel, and never negative. Shu et al., "Channel-wise knowledge distillation for
    dense prediction", ICCV 2021.

    Args:
        student, teacher: maps ``[N, C, H, W]``, fp16, bf16, fp32 or fp64, contiguous, channels_last or any
            strides, each level of its own C, H, W; one dtype a side. Softmaxes are computed in float32 relative
            to each channel's maximum, so that maps of any size, wherever they lie, neither overflow (while a
            channel's maximum less its minimum fits in float32) nor lose digits. NaN or an infinity in a map gives its
            image NaN or infinity.
        tau: temperature, finite and > 0.
        backend: ``"auto"`` (Triton on CUDA, else the reference), ``"triton"`` or ``"reference"``.

    The gradient, ``g[l, n] / tau (P_S - P_T)``, goes to the student in its dtype; it cannot be differentiated
    again. Both maps are read once forward and once backward. Repeats give the same bits.

    Raises:
        ValueError, TypeError: a temperature that is not a number > 0, pyramids of different length, shape, device or
            batch, a teacher map that requires a gradient, in Triton an image of 2**31 elements: before any launch.

    >>> peak = torch.tensor([0.0, 0.0, 0.0, 1.0986123]).view(1, 1, 2, 2)  # softmax 1/6, 1/6, 1/6, 1/2
    >>> round(channel_kl([torch.zeros(1, 1, 2, 2)], [peak]).item(), 6)  # sum of P_T log(4 P_T)
    0.143841
    """
    check_backend(STEM, backend)
    check_temperature(STEM, tau)
    check_pyramids(STEM, student, teacher)
    if torch.compiler.is_compiling():
        out: Tensor = _op(list(student), list(teacher), float(tau), backend)[0]
        return out
    return _Divergence.apply(float(tau), backend, len(student), *student, *savable(teacher))
