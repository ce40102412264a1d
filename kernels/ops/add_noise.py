"""Keyed Gaussian noise on images in their own units: the operation and its gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .backend import room
from .checks import FLOATING
from .once import differentiable_once
from .plan import check_rng, check_sigma, check_tensors, signed, unsigned

OP = "add_noise"
Images = TypeVar("Images", Tensor, Sequence[Tensor])


def _forward(
    images: list[Tensor],
    sigma: Tensor,
    ids: Tensor,
    flip: Tensor,
    sizes: Tensor,
    seed: int,
    epoch: int,
    grey_level: list[float],
    low: list[float],
    high: list[float],
    reverse: bool,
    round_noise: bool,
    rng: str,
    backend: str,
) -> list[Tensor]:
    plan = _plan(images, sigma, ids, flip, sizes, seed, epoch)
    module = room(OP, backend, images[0].device, images[0].dtype)
    out: list[Tensor] = module.forward(images, *plan, grey_level, low, high, reverse, round_noise, rng)
    return out


def _backward(
    grads: list[Tensor],
    images: list[Tensor],
    sigma: Tensor,
    ids: Tensor,
    flip: Tensor,
    sizes: Tensor,
    seed: int,
    epoch: int,
    grey_level: list[float],
    low: list[float],
    high: list[float],
    reverse: bool,
    round_noise: bool,
    rng: str,
    backend: str,
) -> list[Tensor]:
    plan = _plan(images, sigma, ids, flip, sizes, seed, epoch)
    module = room(OP, backend, images[0].device, images[0].dtype)
    out: list[Tensor] = module.backward(
        grads, images, *plan, grey_level, low, high, reverse, round_noise, rng
    )
    return out


_op = torch.library.custom_op("ikd_fast::add_noise", mutates_args=())(_forward)
_op_backward = torch.library.custom_op("ikd_fast::add_noise_backward", mutates_args=())(_backward)


@_op.register_fake
def _(images, *plan):
    return [torch.empty_like(x) for x in images]


@_op_backward.register_fake
def _(grads, images, *plan):
    return [torch.empty_like(x) for x in images]


def _setup(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    images, sigma, ids, flip, sizes, *ctx.numbers = inputs
    ctx.save_for_backward(*images, sigma, ids, flip, sizes)


def _gradient(ctx: Any, grads: list[Tensor | None]) -> tuple:
    *images, sigma, ids, flip, sizes = ctx.saved_tensors
    full = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, images, strict=True)]
    return _op_backward(full, images, sigma, ids, flip, sizes, *ctx.numbers), *[None] * (4 + len(ctx.numbers))


_op.register_autograd(_gradient, setup_context=_setup)


class _Noise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: tuple, numbers: tuple, *images: Tensor) -> tuple[Tensor, ...]:
        ctx.plan, ctx.numbers = plan, numbers
        ctx.save_for_backward(*images)
        return tuple(_forward(list(images), *plan, *numbers))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return None, None, *_backward(list(grads), list(ctx.saved_tensors), *ctx.plan, *ctx.numbers)


def add_noise(
    images: Images,
    sigma: Tensor,
    ids: Tensor,
    *,
    seed: int,
    epoch: int,
    flip: Tensor | None = None,
    sizes: Tensor | None = None,
    grey_level: float | Sequence[float] = 1.0,
    low: float | Sequence[float] = 0.0,
    high: float | Sequence[float] = 255.0,
    channels_reversed: bool = False,
    round_noise: bool = False,
    rng: str = "philox",
    backend: str = "auto",
) -> Images:
    """``clamp(image + sigma * grey_level * n, low, high)``, n ~ N(0, 1): new images, one launch for all on a GPU.

    Element (c, y, x) of n is number ``(c*h + y) * w4 + x`` of the NOISE stream of (seed, id, epoch), w4 being w rounded up
    to a multiple of 4: it depends on the image, not on the batch, its padding or the device. Images with ``sigma`` 0 are
    copied.

    Args:
        images: ``[N, C, H, W]``, or N tensors ``[C, H_i, W_i]``; uint8, fp16, bf16, fp32 or fp64, any strides. Computed in
            float32 (float64 of float64).
        sigma: float32 ``[N]``, standard deviation in 0..255 grey levels; CPU.
        ids: int64 ``[N]``, the images' 64-bit keys; CPU.
        flip: bool ``[N]``, the image has been mirrored, so its noise is mirrored with it; CPU. None: none has.
        sizes: int64 ``[N, 2]``, (h, w) of the valid part at the top left; CPU. The rest is copied. None: all of it.
        grey_level, low, high: size of one grey level and valid range in the images' units: numbers, or one for each of
            the C channels in the images' order.
        channels_reversed: n is counted in the opposite channel order (images turned from BGR to RGB after loading).
        round_noise: round ``sigma * n`` to whole grey levels (uint8 always does). The noise is rounded and not the sum,
            so that one image in different units gets the same noise.
        rng: ``"philox"``, or ``"torch"`` (the reference only: faster on a CPU, see ``AdaptiveFreqAug``).
        backend: ``"auto"`` (Triton on CUDA, else the reference), ``"triton"`` or ``"reference"``.

    The gradient passes where ``low <= image + noise <= high`` and outside the valid part; the noise is made again for it. It
    cannot be differentiated again. On a GPU noise agrees with the CPU's within 1e-5 sigma before rounding.

    Raises:
        ValueError, TypeError: other shapes, dtypes or devices than these, sigma negative or not finite, a grey level that
            is not positive, low > high, sizes beyond an image, an image of 2**31 elements: before any launch.

    >>> import torch
    >>> x = torch.full((1, 3, 4, 4), 0.5)
    >>> y = add_noise(x, torch.tensor([20.4]), torch.tensor([7]), seed=0, epoch=0, grey_level=1 / 255, high=1.0)
    >>> y.shape, bool(((y - x).abs() < 6 * 20.4 / 255).all())
    (torch.Size([1, 3, 4, 4]), True)
    """
    backend = check_rng(OP, rng, backend)
    given: Any = images
    _check_images(given)
    stacked, n = isinstance(given, Tensor), len(given)
    if n == 0:
        return given.clone() if stacked else []
    stacks: list[Tensor] = [given] if stacked else [x[None] for x in given]
    channels = stacks[0].shape[1]
    if flip is None:
        flip = torch.zeros(n, dtype=torch.bool, device="cpu")
    if sizes is None:
        sizes = torch.tensor([tuple(x.shape[2:]) for x in stacks for _ in range(x.shape[0])], device="cpu")
    check_tensors(
        OP,
        n,
        sigma=(sigma, (n,), torch.float32),
        ids=(ids, (n,), torch.int64),
        flip=(flip, (n,), torch.bool),
        sizes=(sizes, (n, 2), torch.int64),
    )
    units: list[list[float]] = _units(channels, grey_level, low, high)
    round_noise = round_noise or stacks[0].dtype == torch.uint8
    plan: tuple[Any, ...] = (sigma, ids, flip, sizes)
    numbers: tuple[Any, ...] = (signed(seed), epoch, *units, channels_reversed, round_noise, rng, backend)
    if torch.compiler.is_compiling():
        out = _op(stacks, *plan, *numbers)
    elif torch.is_grad_enabled() and any(x.requires_grad for x in stacks):
        out = list(_Noise.apply(plan, numbers, *stacks))
    else:
        out = _forward(stacks, *plan, *numbers)
    result: Any = out[0] if stacked else [x[0] for x in out]
    return result


def _check_images(images: Tensor | Sequence[Tensor]) -> None:
    if isinstance(images, Tensor) and images.dim() != 4:
        raise ValueError(
            f"{OP}: images: expected [N, C, H, W] or a list of [C, H, W], got {list(images.shape)}"
        )
    listed = [images] if isinstance(images, Tensor) else images
    for i, image in enumerate(listed):
        name = f"{OP}: images" if isinstance(images, Tensor) else f"{OP}: images[{i}]"
        if not isinstance(images, Tensor) and (image.dim() != 3 or image.shape[0] != listed[0].shape[0]):
            raise ValueError(f"{name}: expected [{listed[0].shape[0]}, H, W], got {list(image.shape)}")
        if image.dtype != torch.uint8 and image.dtype not in FLOATING:
            raise TypeError(f"{name}: expected uint8, fp16, bf16, fp32 or fp64, got {image.dtype}")
        if image.dtype != listed[0].dtype or image.device != listed[0].device:
            raise ValueError(
                f"{name}: expected {listed[0].dtype} on {listed[0].device} as images[0], got {image.dtype} on "
                f"{image.device}"
            )


def _units(channels: int, *values: float | Sequence[float]) -> list[list[float]]:
    """Grey level, lowest and highest value of every channel."""
    rows = []
    for name, value in zip(("grey_level", "low", "high"), values, strict=True):
        row = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)]
        if len(row) not in (1, channels) or not all(math.isfinite(v) for v in row):
            raise ValueError(
                f"{OP}: {name}: expected a finite number, or one for each of {channels} channels, got {value}"
            )
        rows.append(row * channels if len(row) == 1 else row)
    for c, (grey, low, high) in enumerate(zip(*rows, strict=True)):
        if not grey > 0 or not low <= high:
            raise ValueError(
                f"{OP}: channel {c}: expected grey_level > 0 and low <= high, got grey_level={grey}, low={low}, high={high}"
            )
    return rows


def _plan(
    images: Sequence[Tensor], sigma: Tensor, ids: Tensor, flip: Tensor, sizes: Tensor, seed: int, epoch: int
) -> tuple:
    """The plan as lists, its values checked."""
    sigmas, areas = sigma.tolist(), sizes.tolist()
    check_sigma(OP, sigmas)
    shapes = [tuple(stack.shape[2:]) for stack in images for _ in range(stack.shape[0])]
    for i, ((h, w), (height, width)) in enumerate(zip(areas, shapes, strict=True)):
        if not (0 <= h <= height and 0 <= w <= width):
            raise ValueError(
                f"{OP}: sizes[{i}]: expected (h, w) within the image's {(height, width)}, got {(h, w)}"
            )
    return sigmas, ids.tolist(), flip.tolist(), areas, unsigned(seed, epoch), epoch
