"""Distance of two pyramids that ignores each channel's mean and scale: the operation and its gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import check_backend, room
from .checks import check_pyramids, savable, working
from .once import differentiable_once

STEM = "pearson"
# Rows of what the forward keeps for the backward, see the reference.
ROWS = 5


def _forward(
    student: list[Tensor], teacher: list[Tensor], eps: float, min_std: float, backend: str
) -> tuple[Tensor, Tensor]:
    chosen = room(STEM, backend, student[0].device, working(student, teacher))
    out: tuple[Tensor, Tensor] = chosen.forward(student, teacher, eps, min_std)
    return out


def _backward(
    grad: Tensor, student: list[Tensor], teacher: list[Tensor], saved: Tensor, backend: str
) -> list[Tensor]:
    chosen = room(STEM, backend, student[0].device, working(student, teacher))
    out: list[Tensor] = chosen.backward(grad, student, teacher, saved)
    return out


# Registered for torch.compile and export. Eager mode calls the same functions through _Distance, which costs
# a fraction of the dispatcher's time for tensor lists.
_op = torch.library.custom_op("ikd_fast::pearson", mutates_args=())(_forward)
_op_backward = torch.library.custom_op("ikd_fast::pearson_backward", mutates_args=())(_backward)


@_op.register_fake
def _(student, teacher, eps, min_std, backend):
    shapes = (len(student),), (ROWS, sum(s.shape[1] for s in student))
    return tuple(student[0].new_empty(shape, dtype=working(student, teacher)) for shape in shapes)


@_op_backward.register_fake
def _(grad, student, teacher, saved, backend):
    return [torch.empty_like(s) for s in student]


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    student, teacher, _, _, ctx.backend = inputs
    ctx.levels = len(student)
    ctx.save_for_backward(*student, *teacher, output[1])


def _restored(ctx: Any) -> tuple[list[Tensor], list[Tensor], Tensor, str]:
    n, saved = ctx.levels, list(ctx.saved_tensors)
    return saved[:n], saved[n : 2 * n], saved[2 * n], ctx.backend


def _gradient(ctx: Any, grad: Tensor, _: Any) -> tuple:
    grads = _op_backward(grad, *_restored(ctx))
    return grads, [None] * len(grads), None, None, None


_op.register_autograd(_gradient, setup_context=_setup)


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float, min_std: float, backend: str, levels: int, *maps: Tensor) -> Tensor:
        values, saved = _forward(list(maps[:levels]), list(maps[levels:]), eps, min_std, backend)
        ctx.levels, ctx.backend = levels, backend
        ctx.save_for_backward(*maps, saved)
        return values

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grads = _backward(grad, *_restored(ctx))
        return None, None, None, None, *grads, *[None] * len(grads)


def pearson(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    eps: float = 1e-6,
    min_std: float = 1e-3,
    backend: str = "auto",
) -> Tensor:
    """``out[l] = mean over c of sum over n, h, w of (Z_S - Z_T)^2 / (2 M)``: ``[L]``, float32 (float64 of float64).

    ``Z_X = (X - mean) / (std + eps)`` with the mean and the unbiased standard deviation of each channel over all
    ``M = N H W`` elements of it in the batch. For eps = 0 a channel's value is ``(M - 1) / M (1 - r)``, r being
    Pearson's correlation: between 0 and 2, and the same when a channel of either side is shifted or scaled.
    Cao et al., "PKD: General distillation framework for object detectors via Pearson correlation coefficient",
    NeurIPS 2022.

    A constant channel has Z = 0, and a level without elements, or of one element a channel, the value 0. The
    published gradient at a constant channel is ``1 / eps`` times too steep to be of use; here, where the student's
    std is below ``min_std``, the factor 1 / (std + eps) of the gradient is ``1 / (min_std + eps)``: shorter, of the
    same direction. Values do not know of ``min_std``.

    Args:
        student, teacher: maps ``[N, C, H, W]``, fp16, bf16, fp32 or fp64, contiguous, channels_last or any strides,
            each level of its own C, H, W; one dtype a side. Statistics are float32, of differences from an element of
            the channel, so that maps far from 0 lose nothing.
        eps: added to standard deviations, > 0.
        min_std: the smallest std that the gradient divides by, >= 0; 0 is the exact gradient of the value.
        backend: ``"auto"`` (Triton on CUDA, else the reference), ``"triton"`` or ``"reference"``.

    The gradient goes to the student, through its mean and std, in its dtype; it cannot be differentiated again.
    Repeats give the same bits. A NaN or infinity makes its level NaN.

    Raises:
        ValueError, TypeError: as ``pyramid_l2``; eps or min_std out of range.

    >>> t = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 2, 2)
    >>> pearson([10 * t - 7], [t])
    tensor([0.])
    >>> pearson([-t], [t])  # (4 - 1) / 4 * (1 - -1)
    tensor([1.5000])
    """
    check_backend(STEM, backend)
    check_pyramids(STEM, student, teacher)
    if not eps > 0 or math.isinf(eps):
        raise ValueError(f"pearson: eps must be a finite number > 0, got {eps}")
    if not min_std >= 0 or math.isinf(min_std):
        raise ValueError(f"pearson: min_std must be a finite number >= 0, got {min_std}")
    if torch.compiler.is_compiling():
        return _op(list(student), list(teacher), float(eps), float(min_std), backend)[0]
    maps = (*student, *savable(teacher))
    out: Tensor = _Distance.apply(float(eps), float(min_std), backend, len(student), *maps)
    return out
