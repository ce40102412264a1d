"""From decoded uint8 images to a network input in one pass: the fused path of AdaptiveFreqAug."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .add_noise import add_noise

LAYOUTS = ("HWC", "CHW")


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
) -> Tensor:
    """Crop, flip, noise, channel order, normalise, pad, stack.

    Args:
        images: N uint8 tensors of any sizes, ``[H, W, 3]`` or ``[3, H, W]`` (``layout``), on one device.
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
            instead.
        pad_value: value of the padding, in the output's units.
        dtype, channels_last: of the output.

    Returns:
        ``[N, 3, H, W]``; equal to ``AdaptiveFreqAug.apply`` followed by normalise and pad.

    >>> import torch
    >>> x = torch.arange(4 * 6 * 3, dtype=torch.uint8).view(4, 6, 3)
    >>> plan = dict(flip=torch.tensor([True]), sigma=torch.zeros(1), ids=torch.tensor([5]), seed=0, epoch=0)
    >>> y = augment_batch([x], torch.tensor([[1, 0, 4, 2]]), **plan, divisor=4)
    >>> y.shape, y[0, 0, 0].tolist()
    (torch.Size([1, 3, 4, 4]), [9.0, 6.0, 3.0, 0.0])
    """
    _check(images, window, flip, sigma, ids, layout, divisor, mean, std)
    device = images[0].device
    windows, flips, sigmas, keys = window.tolist(), flip.tolist(), sigma.tolist(), ids.tolist()
    tall = max(y1 - y0 for _, y0, _, y1 in windows)
    wide = max(x1 - x0 for x0, _, x1, _ in windows)
    height, width = (-(-side // divisor) * divisor for side in (tall, wide)) if size is None else size
    if tall > height or wide > width:
        raise ValueError(
            f"size: expected at least the largest cropped image, {(tall, wide)} (h, w), got {(height, width)}"
        )
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(
        (len(images), 3, height, width), dtype=dtype, device=device, memory_format=memory_format
    )
    out.fill_(pad_value)
    for i, image in enumerate(images):
        chw = image.permute(2, 0, 1) if layout == "HWC" else image
        x0, y0, x1, y1 = windows[i]
        pixels = chw[:, y0:y1, x0:x1].to(torch.float32)
        if flips[i]:
            pixels = pixels.flip(-1)
        if sigmas[i] > 0:
            key = {"seed": seed, "id": keys[i], "epoch": epoch}
            pixels = add_noise(pixels, sigmas[i], **key, flip=flips[i], round_noise=round_noise, rng=rng)
        if swap_channels:
            pixels = pixels.flip(0)
        target = out[i, :, : y1 - y0, : x1 - x0]
        if mean is None or std is None:
            target.copy_(pixels)
        else:  # by Python numbers: a list copied to the device would be a sync
            for c in range(3):
                target[c] = (pixels[c] - mean[c]) / std[c]
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
) -> None:
    n = len(images)
    if not n:
        raise ValueError("images: expected at least one, got an empty list")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    if divisor < 1:
        raise ValueError(f"divisor must be >= 1, got {divisor}")
    for name, value, shape, dtype in (
        ("window", window, (n, 4), torch.int64),
        ("flip", flip, (n,), torch.bool),
        ("sigma", sigma, (n,), torch.float32),
        ("ids", ids, (n,), torch.int64),
    ):
        if tuple(value.shape) != shape or value.dtype != dtype or value.device.type != "cpu":
            got = f"{value.dtype} {list(value.shape)} on {value.device}"
            raise ValueError(f"{name}: expected {dtype} {list(shape)} on the CPU for {n} images, got {got}")
    if (mean is None) != (std is None) or (
        mean is not None and std is not None and not len(mean) == len(std) == 3
    ):
        raise ValueError(f"mean and std: expected three numbers each or neither, got mean={mean}, std={std}")
    channel = 2 if layout == "HWC" else 0
    for i, (image, (x0, y0, x1, y1)) in enumerate(zip(images, window.tolist(), strict=True)):
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[channel] != 3:
            raise ValueError(
                f"images[{i}]: expected uint8 {layout} with 3 channels, got {image.dtype} {list(image.shape)}"
            )
        if image.device != images[0].device:
            raise ValueError(f"images[{i}]: expected {images[0].device} as images[0], got {image.device}")
        h, w = (image.shape[0], image.shape[1]) if layout == "HWC" else (image.shape[1], image.shape[2])
        if not (0 <= x0 < x1 <= w and 0 <= y0 < y1 <= h):
            raise ValueError(
                f"window[{i}]: expected 0 <= x0 < x1 <= {w} and 0 <= y0 < y1 <= {h}, got {[x0, y0, x1, y1]}"
            )
        if float(sigma[i]) > 0 and (x0, y0, x1, y1) != (0, 0, w, h):
            raise ValueError(
                f"window[{i}]: an image with noise keeps its whole window {[0, 0, w, h]}, "
                f"got {[x0, y0, x1, y1]}"
            )
