"""From decoded uint8 images to a network input in one pass: the operation and its checks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import room
from .plan import check_rng, check_sigma, check_tensors, signed, unsigned

OP = "augment_batch"
LAYOUTS = ("HWC", "CHW")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _forward(
    images: list[Tensor],
    window: Tensor,
    flip: Tensor,
    sigma: Tensor,
    ids: Tensor,
    seed: int,
    epoch: int,
    hwc: bool,
    swap: bool,
    mean: list[float],
    std: list[float],
    height: int,
    width: int,
    pad_value: float,
    dtype: torch.dtype,
    channels_last: bool,
    round_noise: bool,
    rng: str,
    backend: str,
) -> Tensor:
    _check_values(images, window, sigma, hwc, height, width)
    module = room(OP, backend, images[0].device, images[0].dtype)
    out: Tensor = module.forward(
        images, window, flip, sigma, ids, unsigned(seed, epoch), epoch, hwc, swap, mean, std, height, width, pad_value,
        dtype, channels_last, round_noise, rng,
    )  # fmt: skip
    return out


_op = torch.library.custom_op("ikd_fast::augment_batch", mutates_args=())(_forward)


@_op.register_fake
def _(images, window, flip, sigma, ids, seed, epoch, hwc, swap, mean, std, height, width, pad_value, dtype,
      channels_last, round_noise, rng, backend):  # fmt: skip
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (len(images), 3, height, width), dtype=dtype, device=images[0].device, memory_format=memory_format
    )


def augment_batch(
    images: Sequence[Tensor],
    window: Tensor,
    flip: Tensor,
    sigma: Tensor,
    ids: Tensor,
    *,
    seed: int,
    epoch: int,
    layout: str = "HWC",
    swap_channels: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    divisor: int = 32,
    size: tuple[int, int] | None = None,
    pad_value: float = 0.0,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    round_noise: bool = True,
    rng: str = "philox",
    backend: str = "auto",
) -> Tensor:
    """Crop, flip, noise, channel order, normalise, pad, stack: one launch for the batch on a GPU.

    Args:
        images: N uint8 tensors of any sizes and strides, ``[H, W, 3]`` or ``[3, H, W]`` (``layout``), on one device.
        window: int64 ``[N, 4]``, x0, y0, x1, y1 kept of each image, in its pixels before the flip; CPU.
        flip: bool ``[N]``, mirror after the crop; CPU.
        sigma: float32 ``[N]``, noise in grey levels, 0 for none; CPU. An image with noise keeps its whole
            window.
        ids: int64 ``[N]``, the images' 64-bit keys; CPU. With ``seed`` and ``epoch`` they key the noise (see
            ``add_noise``).
        swap_channels: reverse the channels (BGR to RGB) after the noise, whose channel index is that of the
            input.
        mean, std: normalisation in 0..255 units, in the output's channel order; None leaves 0..255.
        divisor: the output's sides are the largest cropped ones rounded up to it; ``size`` (H, W) fixes them
            instead, and is required under ``torch.compile``.
        pad_value: value of the padding, in the output's units.
        dtype: float32, float16 or bfloat16; computed in float32.
        round_noise: noise in whole grey levels, as ``AdaptiveFreqAug`` adds it to uint8 images.
        rng: ``"philox"``, or ``"torch"`` (the reference only: faster on a CPU).
        backend: ``"auto"`` (Triton on CUDA, else the reference), ``"triton"`` or ``"reference"``.

    Returns:
        ``[N, 3, H, W]``, contiguous or ``channels_last``; equal to ``AdaptiveFreqAug.apply`` followed by normalise and
        pad. On a GPU noise agrees with the CPU's within 1e-5 sigma before rounding.

    Raises:
        ValueError, TypeError: no images, other dtypes, devices or shapes than these, a window outside its image, an image
            with noise and less than its whole window, sigma negative or not finite, std not positive, ``size`` smaller
            than a window, an image of 2**31 elements: before any launch.

    >>> import torch
    >>> x = torch.arange(4 * 6 * 3, dtype=torch.uint8).view(4, 6, 3)
    >>> plan = dict(flip=torch.tensor([True]), sigma=torch.zeros(1), ids=torch.tensor([5]), seed=0, epoch=0)
    >>> y = augment_batch([x], torch.tensor([[1, 0, 4, 2]]), **plan, divisor=4)
    >>> y.shape, y[0, 0, 0].tolist()
    (torch.Size([1, 3, 4, 4]), [9.0, 6.0, 3.0, 0.0])
    """
    backend = check_rng(OP, rng, backend)
    _check(images, window, flip, sigma, ids, layout, divisor, mean, std, dtype)
    compiling = torch.compiler.is_compiling()
    if size is None:
        if compiling:
            raise ValueError(f"{OP}: under torch.compile the output's size must be known; write size=(H, W)")
        rows = window.tolist()
        tall, wide = max(y1 - y0 for _, y0, _, y1 in rows), max(x1 - x0 for x0, _, x1, _ in rows)
        size = -(-tall // divisor) * divisor, -(-wide // divisor) * divisor
    run = _op if compiling else _forward
    out: Tensor = run(
        list(images), window, flip, sigma, ids, signed(seed), epoch, layout == "HWC", swap_channels,
        list(mean or ()), list(std or ()), *size, float(pad_value), dtype, channels_last, round_noise, rng, backend,
    )  # fmt: skip
    return out


def _check(
    images: Sequence[Tensor],
    window: Tensor,
    flip: Tensor,
    sigma: Tensor,
    ids: Tensor,
    layout: str,
    divisor: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> None:
    """What is known without looking at values."""
    n = len(images)
    if not n:
        raise ValueError(f"{OP}: images: expected at least one, got an empty list")
    if layout not in LAYOUTS:
        raise ValueError(f"{OP}: layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    if divisor < 1:
        raise ValueError(f"{OP}: divisor must be >= 1, got {divisor}")
    if dtype not in DTYPES:
        raise TypeError(f"{OP}: expected float32, float16 or bfloat16 as dtype, got {dtype}")
    check_tensors(
        OP,
        n,
        window=(window, (n, 4), torch.int64),
        flip=(flip, (n,), torch.bool),
        sigma=(sigma, (n,), torch.float32),
        ids=(ids, (n,), torch.int64),
    )
    if (mean is None) != (std is None) or (
        mean is not None and std is not None and not len(mean) == len(std) == 3
    ):
        raise ValueError(
            f"{OP}: mean and std: expected three numbers each or neither, got mean={mean}, std={std}"
        )
    if mean is not None and not all(math.isfinite(m) for m in mean):
        raise ValueError(f"{OP}: mean: expected three finite numbers, got {tuple(mean)}")
    if std is not None and not all(0 < s < math.inf for s in std):
        raise ValueError(f"{OP}: std: expected three finite numbers > 0, got {tuple(std)}")
    channel = 2 if layout == "HWC" else 0
    for i, image in enumerate(images):
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[channel] != 3:
            raise ValueError(
                f"{OP}: images[{i}]: expected uint8 {layout} with 3 channels, got {image.dtype} {list(image.shape)}"
            )
        if image.device != images[0].device:
            raise ValueError(
                f"{OP}: images[{i}]: expected {images[0].device} as images[0], got {image.device}"
            )


def _check_values(
    images: Sequence[Tensor], window: Tensor, sigma: Tensor, hwc: bool, height: int, width: int
) -> None:
    """What only running shows: the plan's numbers."""
    check_sigma(OP, sigma.tolist())
    rows = window.tolist()
    for i, (image, (x0, y0, x1, y1), noise) in enumerate(zip(images, rows, sigma.tolist(), strict=True)):
        h, w = image.shape[:2] if hwc else image.shape[1:]
        if not (0 <= x0 < x1 <= w and 0 <= y0 < y1 <= h):
            raise ValueError(
                f"{OP}: window[{i}]: expected 0 <= x0 < x1 <= {w} and 0 <= y0 < y1 <= {h}, got {[x0, y0, x1, y1]}"
            )
        if noise > 0 and (x0, y0, x1, y1) != (0, 0, w, h):
            raise ValueError(
                f"{OP}: window[{i}]: an image with noise keeps its whole window {[0, 0, w, h]}, got {[x0, y0, x1, y1]}"
            )
    tall, wide = max(y1 - y0 for _, y0, _, y1 in rows), max(x1 - x0 for x0, _, x1, _ in rows)
    if tall > height or wide > width:
        raise ValueError(
            f"{OP}: size: expected at least the largest cropped image, {(tall, wide)} (h, w), got {(height, width)}"
        )
