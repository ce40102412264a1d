"""Structural dissimilarity of two pyramids: the operation and its gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import check_backend, room
from .checks import check_pyramids, savable, working
from .once import differentiable_once

STEM = "ssim"
# The largest window of the Triton kernels; one bound for both rooms.
MAX_WINDOW = 49


def _forward(
    student: list[Tensor],
    teacher: list[Tensor],
    window: int,
    sigma: float,
    data_range: float,
    backend: str,
) -> Tensor:
    out: Tensor = room(STEM, backend, student[0].device, working(student, teacher)).forward(
        student, teacher, window, sigma, data_range
    )
    return out


def _backward(
    grad: Tensor,
    student: list[Tensor],
    teacher: list[Tensor],
    window: int,
    sigma: float,
    data_range: float,
    backend: str,
) -> list[Tensor]:
    out: list[Tensor] = room(STEM, backend, student[0].device, working(student, teacher)).backward(
        grad, student, teacher, window, sigma, data_range
    )
    return out


# Registered for torch.compile and export; eager mode calls the same functions through _SSIM.
_op = torch.library.custom_op("ikd_fast::ssim", mutates_args=())(_forward)
_op_backward = torch.library.custom_op("ikd_fast::ssim_backward", mutates_args=())(_backward)


@_op.register_fake
def _(student, teacher, window, sigma, data_range, backend):
    return student[0].new_empty((len(student), student[0].shape[0]), dtype=working(student, teacher))


@_op_backward.register_fake
def _(grad, student, teacher, window, sigma, data_range, backend):
    return [torch.empty_like(s) for s in student]


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    student, teacher, *ctx.settings = inputs
    ctx.save_for_backward(*student, *teacher)


def _saved(ctx: Any) -> tuple[list[Tensor], list[Tensor]]:
    saved = list(ctx.saved_tensors)
    n = len(saved) // 2
    return saved[:n], saved[n:]


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    student, teacher = _saved(ctx)
    grads = _op_backward(grad, student, teacher, *ctx.settings)
    return grads, [None] * len(teacher), None, None, None, None


_op.register_autograd(_gradient, setup_context=_setup)


class _SSIM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, window: int, sigma: float, data_range: float, backend: str, levels: int, *maps: Tensor
    ) -> Tensor:
        ctx.settings = (window, sigma, data_range, backend)
        ctx.save_for_backward(*maps)
        return _forward(list(maps[:levels]), list(maps[levels:]), *ctx.settings)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple:
        student, teacher = _saved(ctx)
        grads = _backward(grad, student, teacher, *ctx.settings)
        return (None, None, None, None, None, *grads, *[None] * len(teacher))


def check_window(owner: str, window: Any) -> int:
    """An odd integer in 1..49."""
    if (
        not isinstance(window, int)
        or isinstance(window, bool)
        or not 1 <= window <= MAX_WINDOW
        or not window % 2
    ):
        raise ValueError(f"{owner}: window must be an odd integer in 1..{MAX_WINDOW}, got {window!r}")
    return window


def _positive(name: str, value: float) -> float:
    if not value > 0 or math.isinf(value):
        raise ValueError(f"ssim: {name} must be a finite number > 0, got {value!r}")
    return float(value)


def ssim(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    window: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Mean structural dissimilarity of every level and image: ``[levels, N]``, float32 (float64 of float64).

    ``out[l, n] = mean over c, h, w of clamp((1 - SSIM) / 2, 0, 1)``, in each channel plane

    ``SSIM = (2 mu_S mu_T + C1) (2 cov + C2) / ((mu_S^2 + mu_T^2 + C1) (var_S + var_T + C2) + eps)``

    with means, variances and covariance under a Gaussian window of sum 1, borders reflected (the border pixel
    is not repeated), ``C1 = (0.01 R)^2``, ``C2 = (0.03 R)^2``, ``eps = 1e-12 R^4``, R = ``data_range``. 0 for
    equal maps but for eps (at most 5.6e-6, where both are zero), 1 at most. Wang et al., "Image quality
    assessment: from error visibility to structural similarity", 2004; eps and clamp as kornia's ``ssim_loss``.

    Args:
        student, teacher: maps ``[N, C, H, W]``, fp16, bf16, fp32 or fp64, contiguous, channels_last or any
            strides, each level of its own C, H, W; one dtype a side. Nothing is rescaled: values are taken to
            span about ``data_range``.
        window: taps of the Gaussian, odd, 1..49. A level with ``min(H, W) <= window // 2`` takes the largest
            odd window with ``window // 2 < min(H, W)``.
        sigma: of the Gaussian, in cells of the map.
        data_range: R above.
        backend: ``"auto"`` (Triton on CUDA, else the reference), ``"triton"`` or ``"reference"``.

    The gradient goes to the student in its dtype and is zero where the clamp acts; it cannot be
    differentiated again. It is that of a mean: of fp16 maps beyond some 1e4 elements it is subnormal in
    fp16 without a loss scale. Computed in float32 from local differences, so that a plane's constant part and S
    close to T cost no digits. Repeats give the same bits.

    Raises:
        ValueError, TypeError: pyramids of different length, shape, device or batch, a map without elements,
            a teacher map that requires a gradient, a bad number, in Triton an image of 2**31 elements.

    >>> black, white = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    >>> [round(float(ssim([black], [x])), 3) for x in (black, white)]  # SSIM of the two is C1 / (1 + C1)
    [0.0, 0.5]
    """
    check_backend("ssim", backend)
    check_pyramids("ssim", student, teacher)
    for level, s in enumerate(student):
        if 0 in s.shape[1:]:
            raise ValueError(
                f"ssim, level {level}: expected maps of at least one element an image, got {tuple(s.shape)}"
            )
    settings = (check_window("ssim", window), _positive("sigma", sigma), _positive("data_range", data_range))
    if torch.compiler.is_compiling():
        return _op(list(student), list(teacher), *settings, backend)
    return _SSIM.apply(*settings, backend, len(student), *student, *savable(teacher))
