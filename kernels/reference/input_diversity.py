"""Input diversity of DI-FGSM: shrink an image, put it at an offset inside its own frame, fill the rest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def input_diversity(images: Tensor, frames: Tensor, windows: Tensor, fill: Tensor) -> Tensor:
    """Resize the valid region of each image (bilinear, half-pixel centres) into a window of the same region.

    Xie et al., "Improving Transferability of Adversarial Examples with Input Diversity", CVPR 2019. With the aspect kept
    by the caller, a box maps by ``x -> x0 + x * w_out / w_in``. Differentiable in ``images``; the gradient is the exact
    adjoint of the (linear) map.

    Args:
        images: ``[N, C, H, W]`` floating.
        frames: ``[N, 2]`` (h, w) of the valid region, top left; padding beyond it is returned as it is.
        windows: ``[N, 4]`` (x0, y0, w_out, h_out) in pixels, inside the frame.
        fill: ``[C, 1, 1]`` or scalar tensor: value of the frame outside the window.
    Shape:
        returns ``[N, C, H, W]``, dtype of ``images``.

    >>> x = torch.rand(1, 3, 8, 8)
    >>> y = input_diversity(x, torch.tensor([[8, 8]]), torch.tensor([[2, 1, 4, 4]]), torch.zeros(()))
    >>> torch.allclose(y[..., 1:5, 2:6], torch.nn.functional.avg_pool2d(x, 2), atol=1e-6)
    True
    """
    _, _, height, width = images.shape
    work = torch.float64 if images.dtype == torch.float64 else torch.float32
    # Read where that waits for nobody.
    padded = frames.device.type != "cpu" or any(frame != [height, width] for frame in frames.tolist())
    # Host tensors of a few numbers: copied without waiting.
    windows = windows.to(images.device, work, non_blocking=True)
    frames = frames.to(images.device, work, non_blocking=True)
    x, in_x, frame_x = _axis(width, frames[:, 1], windows[:, 0], windows[:, 2])
    y, in_y, frame_y = _axis(height, frames[:, 0], windows[:, 1], windows[:, 3])
    # grid_sample's coordinates: -1 and 1 are the outer edges of the first and last pixel.
    grid = torch.stack(
        [
            ((2 * x + 1) / width - 1)[:, None, :].expand(-1, height, -1),
            ((2 * y + 1) / height - 1)[:, :, None].expand(-1, -1, width),
        ],
        dim=-1,
    )
    moved = F.grid_sample(images.to(work), grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = (in_y[:, None, :, None] & in_x[:, None, None, :]).expand_as(moved)
    out = torch.where(inside, moved, fill.to(images.device, work, non_blocking=True))
    if padded:
        frame = (frame_y[:, None, :, None] & frame_x[:, None, None, :]).expand_as(moved)
        out = torch.where(frame, out, images.to(work))
    return out.to(images.dtype)


def _axis(size: int, frame: Tensor, start: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Source coordinate of every output pixel, clamped to the valid region; inside the window; inside the frame."""
    out = torch.arange(size, device=frame.device, dtype=frame.dtype)[None, :]
    start, length, frame = start[:, None], length[:, None], frame[:, None]
    source = (out - start + 0.5) * (frame / length) - 0.5
    source = torch.minimum(source.clamp_min(0), frame - 1)
    return source, (out >= start) & (out < start + length), out < frame
