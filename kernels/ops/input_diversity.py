"""Input diversity of DI-FGSM: shrink an image, put it at an offset inside its own frame, fill the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import room
from .checks import FLOATING
from .frames import check_frames, check_small
from .once import differentiable_once

OP = "input_diversity"


def _forward(images: Tensor, frames: Tensor, windows: Tensor, fill: Tensor, backend: str) -> Tensor:
    plan = _plan(images, frames, windows)
    module = room(OP, backend, images.device, images.dtype)
    work = torch.float64 if images.dtype == torch.float64 else torch.float32
    out: Tensor = module.forward(images, *plan, fill.to(images.device, work, non_blocking=True))
    return out


def _backward(grad: Tensor, frames: Tensor, windows: Tensor, backend: str) -> Tensor:
    plan = _plan(grad, frames, windows)
    out: Tensor = room(OP, backend, grad.device, grad.dtype).backward(grad, *plan)
    return out


_op = torch.library.custom_op("ikd_fast::input_diversity", mutates_args=())(_forward)
_op_backward = torch.library.custom_op("ikd_fast::input_diversity_backward", mutates_args=())(_backward)


@_op.register_fake
def _(images, *plan):
    return torch.empty_like(images)


@_op_backward.register_fake
def _(grad, *plan):
    return torch.empty_like(grad)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, frames, windows, _, ctx.backend = inputs
    ctx.save_for_backward(frames, windows)


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    frames, windows = ctx.saved_tensors
    return _op_backward(grad, frames, windows, ctx.backend), None, None, None, None


_op.register_autograd(_gradient, setup_context=_setup)


class _Diversity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, frames: Tensor, windows: Tensor, fill: Tensor, backend: str
    ) -> Tensor:
        ctx.plan = (frames, windows, backend)
        return _forward(images, frames, windows, fill, backend)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _backward(grad, *ctx.plan), None, None, None, None


def input_diversity(
    images: Tensor, frames: Tensor, windows: Tensor, fill: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Resize the valid region of each image (bilinear, half-pixel centres) into a window of the same region.

    Xie et al., "Improving Transferability of Adversarial Examples with Input Diversity", CVPR 2019. With the aspect kept
    by the caller, a box maps by ``x -> x0 + x * w_out / w_in``. One launch for the batch on a GPU, and one for its gradient,
    which is the exact adjoint of the (linear) map: each input pixel sums the output pixels that read it, in a fixed order.
    It cannot be differentiated again.

    Args:
        images: ``[N, C, H, W]`` fp16, bf16, fp32 or fp64, any strides. Computed in float32 (float64 of float64).
        frames: int64 ``[N, 2]``, (h, w) of the valid region, top left; CPU. Padding beyond it is returned as it is.
        windows: int64 ``[N, 4]``, (x0, y0, w_out, h_out) in pixels, inside the frame; CPU. An image whose window is its whole
            frame is returned bit for bit.
        fill: ``[C, 1, 1]``, ``[C]`` or a scalar tensor, without a gradient: value of the frame outside the window.
        backend: ``"auto"`` (Triton on CUDA, else the reference), ``"triton"`` or ``"reference"``.
    Shape:
        returns a new ``[N, C, H, W]``, dtype of ``images``.

    Raises:
        ValueError, TypeError: other shapes, dtypes or devices than these, a frame beyond its image or a window beyond its frame,
            a fill that requires a gradient; with Triton, an image of 2**31 elements or a side beyond 32767: before any launch.

    >>> x = torch.rand(1, 3, 8, 8)
    >>> y = input_diversity(x, torch.tensor([[8, 8]]), torch.tensor([[2, 1, 4, 4]]), torch.zeros(()))
    >>> torch.allclose(y[..., 1:5, 2:6], torch.nn.functional.avg_pool2d(x, 2), atol=1e-6)
    True
    """
    if images.dim() != 4 or images.dtype not in FLOATING:
        raise TypeError(
            f"{OP}: images: expected fp16, bf16, fp32 or fp64 [N, C, H, W], got {images.dtype} {list(images.shape)}"
        )
    n, channels = images.shape[:2]
    check_small(OP, n, frames=(frames, (n, 2)), windows=(windows, (n, 4)))
    if tuple(fill.shape) not in ((), (1,), (1, 1, 1), (channels,), (channels, 1, 1)):
        raise ValueError(
            f"{OP}: fill: expected a scalar, [{channels}] or [{channels}, 1, 1], got {list(fill.shape)}"
        )
    if fill.requires_grad:
        raise ValueError(f"{OP}: fill requires a gradient, which it does not get; write fill.detach()")
    fill = fill.reshape(-1)
    if images.numel() == 0:
        return images.clone()
    if torch.compiler.is_compiling():
        return _op(images, frames, windows, fill, backend)
    if torch.is_grad_enabled() and images.requires_grad:
        out: Tensor = _Diversity.apply(images, frames, windows, fill, backend)
        return out
    return _forward(images, frames, windows, fill, backend)


def _plan(images: Tensor, frames: Tensor, windows: Tensor) -> tuple[list, list]:
    """Frames and windows as tuples, their values checked."""
    areas = check_frames(OP, frames, images.shape[2:])
    found: list[tuple[int, ...]] = [tuple(window) for window in windows.tolist()]
    for i, ((h, w), (x0, y0, w_out, h_out)) in enumerate(zip(areas, found, strict=True)):
        if min(x0, y0) < 0 or min(w_out, h_out) < 1 or x0 + w_out > w or y0 + h_out > h:
            raise ValueError(
                f"{OP}: windows[{i}]: expected (x0, y0, w_out, h_out) of at least one pixel within the frame's {h}x{w} (h, w), "
                f"got {found[i]}"
            )
    return areas, found
