"""Sums of squared and of absolute differences of two pyramids: the operation and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import check_backend, room
from .checks import check_pyramids, check_valid, savable, working
from .once import differentiable_once

STEM = "pyramid_l2"


def _forward(
    student: list[Tensor], teacher: list[Tensor], valid: list[Tensor], square: bool, backend: str
) -> Tensor:
    out: Tensor = room(STEM, backend, student[0].device, working(student, teacher)).forward(
        student, teacher, valid, square
    )
    return out


def _backward(
    grad: Tensor,
    student: list[Tensor],
    teacher: list[Tensor],
    valid: list[Tensor],
    square: bool,
    backend: str,
) -> list[Tensor]:
    out: list[Tensor] = room(STEM, backend, student[0].device, working(student, teacher)).backward(
        grad, student, teacher, valid, square
    )
    return out


# Registered for torch.compile and export. Eager mode calls the same functions through _Distance, which costs
# a fraction of the dispatcher's time for tensor lists.
_op = torch.library.custom_op("ikd_fast::pyramid_distance", mutates_args=())(_forward)
_op_backward = torch.library.custom_op("ikd_fast::pyramid_distance_backward", mutates_args=())(_backward)


@_op.register_fake
def _(student, teacher, valid, square, backend):
    return student[0].new_empty((len(student), student[0].shape[0]), dtype=working(student, teacher))


@_op_backward.register_fake
def _(grad, student, teacher, valid, square, backend):
    return [torch.empty_like(s) for s in student]


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    student, teacher, valid, ctx.square, ctx.backend = inputs
    ctx.levels = len(student)
    ctx.save_for_backward(*student, *teacher, *valid)


def _saved(ctx: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    n, saved = ctx.levels, list(ctx.saved_tensors)
    return saved[:n], saved[n : 2 * n], saved[2 * n :]


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    student, teacher, valid = _saved(ctx)
    grads = _op_backward(grad, student, teacher, valid, ctx.square, ctx.backend)
    return grads, [None] * len(teacher), [None] * len(valid), None, None


_op.register_autograd(_gradient, setup_context=_setup)


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, square: bool, backend: str, levels: int, *maps: Tensor) -> Tensor:
        student, teacher, valid = (
            list(maps[:levels]),
            list(maps[levels : 2 * levels]),
            list(maps[2 * levels :]),
        )
        ctx.square, ctx.backend, ctx.levels = square, backend, levels
        ctx.save_for_backward(*maps)
        return _forward(student, teacher, valid, square, backend)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple:
        student, teacher, valid = _saved(ctx)  # once: checkpointing refuses a second reading
        grads = _backward(grad, student, teacher, valid, ctx.square, ctx.backend)
        return (None, None, None, *grads, *[None] * (len(teacher) + len(valid)))


def _distance(
    op: str,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    valid: Sequence[Tensor] | None,
    square: bool,
    backend: str,
) -> Tensor:
    check_backend(op, backend)
    check_pyramids(op, student, teacher)
    masks = check_valid(op, valid, student)
    if torch.compiler.is_compiling():
        return _op(list(student), list(teacher), masks, square, backend)
    return _Distance.apply(square, backend, len(student), *student, *savable(teacher), *masks)


def pyramid_l2(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    valid: Sequence[Tensor] | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """``out[l, n] = sum over c, h, w of (S_l - T_l)^2``: ``[levels, N]``, float32 (float64 of float64).

    Args:
        student, teacher: maps ``[N, C, H, W]``, fp16, bf16, fp32 or fp64, contiguous, channels_last or any
            strides, each level of its own C, H, W; one dtype a side. Sums are kept in float32.
        valid: bool ``[N, H, W]`` for every level; positions where it is false count for nothing and get no
            gradient, whatever they hold.
        backend: ``"auto"`` (Triton on CUDA, else the reference), ``"triton"`` or ``"reference"``.

    The gradient, ``2 g[l, n] (S_l - T_l)``, goes to the student in its dtype; it cannot be differentiated
    again. Repeats give the same bits.

    Raises:
        ValueError, TypeError: pyramids of different length, shape, device or batch, a teacher map that
            requires a gradient, masks of another shape, in Triton an image of 2**31 elements: before any launch.

    >>> pyramid_l2([torch.full((1, 2, 3, 3), 2.0)], [torch.zeros(1, 2, 3, 3)])
    tensor([[72.]])
    """
    return _distance("pyramid_l2", student, teacher, valid, True, backend)


def pyramid_l1(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    valid: Sequence[Tensor] | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """``out[l, n] = sum over c, h, w of |S_l - T_l|``; otherwise as ``pyramid_l2``. The gradient at 0 is 0.

    >>> pyramid_l1([torch.full((1, 2, 3, 3), -2.0)], [torch.zeros(1, 2, 3, 3)])
    tensor([[36.]])
    """
    return _distance("pyramid_l1", student, teacher, valid, False, backend)
