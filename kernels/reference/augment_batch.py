"""From decoded uint8 images to a network input, a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .add_noise import chunks, noise_rows


def forward(
    images: Sequence[Tensor],
    window: Tensor,
    flip: Tensor,
    sigma: Tensor,
    ids: Tensor,
    seed: int,
    epoch: int,
    hwc: bool,
    swap: bool,
    mean: Sequence[float],
    std: Sequence[float],
    height: int,
    width: int,
    pad_value: float,
    dtype: torch.dtype,
    channels_last: bool,
    round_noise: bool,
    rng: str,
) -> Tensor:
    """``[N, 3, height, width]``; ``mean`` and ``std`` in the output's channel order, empty for none."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape, device = (len(images), 3, height, width), images[0].device
    out = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
    plan = zip(images, window.tolist(), flip.tolist(), sigma.tolist(), ids.tolist(), strict=True)
    for canvas, (image, (x0, y0, x1, y1), mirror, strength, key) in zip(out, plan, strict=True):
        chw = image.permute(2, 0, 1) if hwc else image
        pixels = chw[:, y0:y1, x0:x1]
        h, w = y1 - y0, x1 - x0
        canvas[:, h:] = pad_value
        canvas[:, :h, w:] = pad_value
        noise = None
        if strength > 0:
            noise = noise_rows((3, h, w), seed=seed, id=key, epoch=epoch, device=device, rng=rng)
        for c in range(3):
            c_out = 2 - c if swap else c
            for first, last in chunks(h, w, device):
                target = canvas[c_out, first:last, :w]
                part = pixels[c, first:last]
                if noise is not None:
                    field = noise(c, first, last).mul_(strength)
                    part = (field.round_() if round_noise else field).add_(part).clamp_(0, 255)
                # By Python numbers: a list copied to a device would be a sync.
                _write(target, part.flip(-1) if mirror else part, *(v[c_out] for v in (mean, std) if len(v)))
    return out


def _write(target: Tensor, pixels: Tensor, mean: float | None = None, std: float | None = None) -> None:
    """``(pixels - mean) / std`` in float32, without a copy where the target is float32; float ``pixels`` are spent."""
    if mean is None or std is None:
        target.copy_(pixels)
    elif target.dtype != torch.float32:
        work = pixels if pixels.is_floating_point() else pixels.to(torch.float32)
        target.copy_(work.sub_(mean).div_(std))
    elif pixels.is_floating_point():
        torch.div(pixels.sub_(mean), std, out=target)
    else:
        target.copy_(pixels).sub_(mean).div_(std)
