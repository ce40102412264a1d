"""Images of one net's input units in another's: normalisation and channel order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ikd_fast.pixels import PixelUnits


class Renormalize:
    """``(images, sizes) -> images``: student's input units to the teacher's; padding becomes 0, as each net pads it.

    Args:
        source, target: units of either side.
        flip_channels: also turn RGB into BGR (or back).

    >>> convert = Renormalize(PixelUnits(value_range=(0, 1)), PixelUnits(value_range=(0, 255)))
    >>> round(float(convert(torch.ones(1, 3, 2, 2), None).max()), 3)
    255.0
    """

    def __init__(self, source: PixelUnits, target: PixelUnits, *, flip_channels: bool = False) -> None:
        self.source, self.target, self.flip_channels = source, target, flip_channels

    @property
    def identity(self) -> bool:
        return self.source == self.target and not self.flip_channels

    def __call__(self, images: Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        if self.identity:
            return images
        pixels = self.source.to_pixels(images)
        if self.flip_channels:
            pixels = pixels.flip(1)
        out = self.target.from_pixels(pixels, images.dtype)
        height, width = images.shape[-2:]
        if sizes is None or all((h, w) == (height, width) for h, w in sizes):
            return out
        mask = torch.zeros_like(out[:, :1])
        for i, (h, w) in enumerate(sizes):
            mask[i, :, :h, :w].fill_(1)
        return out * mask
