"""Input diversity of DI-FGSM image by image, by torch's grid sampling, and its exact adjoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Frames = Sequence[tuple[int, int]]
Windows = Sequence[tuple[int, int, int, int]]


def forward(images: Tensor, frames: Frames, windows: Windows, fill: Tensor) -> Tensor:
    """``[N, C, H, W]``, see the operation; ``fill``: ``[C]`` or ``[1]`` in the dtype that is computed in."""
    out = torch.empty_like(images)
    color = fill.to(images.dtype)[:, None, None]
    for image, target, frame, window in zip(images, out, frames, windows, strict=True):
        (h, w), (x0, y0, w_out, h_out) = frame, window
        if window == (0, 0, w, h):
            target.copy_(image)
            continue
        _copy_padding(image, target, frame)
        target[:, :y0, :w] = color
        target[:, y0 + h_out : h, :w] = color
        target[:, y0 : y0 + h_out, :x0] = color
        target[:, y0 : y0 + h_out, x0 + w_out : w] = color
        x, y = (_sources(*side, fill.dtype, image.device) for side in ((w, w_out), (h, h_out)))
        target[:, y0 : y0 + h_out, x0 : x0 + w_out] = _sample(image[None].to(fill.dtype), y, x)[0]
    return out


def backward(grad: Tensor, frames: Frames, windows: Windows) -> Tensor:
    """The gradient of the images, with the strides of ``grad``.

    No side is enlarged, so two neighbouring output pixels of a row and two of a column read an input pixel at most: the adjoint
    is a bilinear sample between them, times the sums of their weights.
    """
    out = torch.empty_like(grad)
    work = torch.float64 if grad.dtype == torch.float64 else torch.float32
    for upstream, target, frame, window in zip(grad, out, frames, windows, strict=True):
        (h, w), (x0, y0, w_out, h_out) = frame, window
        if window == (0, 0, w, h):
            target.copy_(upstream)
            continue
        _copy_padding(upstream, target, frame)
        (x, weight_x), (y, weight_y) = (
            _readers(*side, work, grad.device) for side in ((w, w_out), (h, h_out))
        )
        part = upstream[None, :, y0 : y0 + h_out, x0 : x0 + w_out].to(work)
        target[:, :h, :w] = _sample(part, y, x)[0].mul_(weight_x).mul_(weight_y[:, None])
    return out


def _copy_padding(image: Tensor, target: Tensor, frame: tuple[int, int]) -> None:
    h, w = frame
    target[:, h:] = image[:, h:]
    target[:, :h, w:] = image[:, :h, w:]


def _sample(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """``[N, C, len(y), len(x)]``: values between the pixels, whose centres have whole coordinates."""
    # grid_sample's -1 and 1 are the outer edges of the first and last pixel.
    y, x = ((2 * c + 1) / size - 1 for c, size in zip((y, x), images.shape[2:], strict=True))
    grid = torch.stack([x[None, :].expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
    return F.grid_sample(
        images,
        grid.expand(len(images), -1, -1, -1),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )


def _sources(frame: int, length: int, work: torch.dtype, device: torch.device) -> Tensor:
    """Where each output pixel of one side lies among the inputs."""
    out = torch.arange(length, device=device, dtype=work)
    return ((out + 0.5) * (frame / length) - 0.5).clamp(0, frame - 1)


def _readers(frame: int, length: int, work: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the outputs that read each input pixel of one side lie, by their weights, and the sum of these."""
    inputs = torch.arange(frame, device=device)
    # Output k lies at ((2 k + 1) frame - length) / (2 length) and reads what is less than 1 away.
    first = (length * (2 * inputs - 1) + frame) // (2 * frame)
    near = (2 * first + 1) * frame - length - 2 * length * inputs
    a, b = ((2 * length - (near + shift).abs()).clamp_min(0) for shift in (0, 2 * frame))
    a, b = a * (first < length), b * (first + 1 < length)
    total = a + b
    return first + b.to(work) / total.clamp_min(1), total.to(work) / (2 * length)
