"""What a strength report asks of the net it is about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ikd_fast.pixels import PixelUnits


@dataclass(frozen=True)
class StrengthBatch:
    """Some of the images.

    Attributes:
        images: ``[N, C, H, W]`` float, as the net takes them.
        targets: one dict an image: ``boxes`` (xyxy, network pixels), ``labels``, ``size``.
        sizes: (h, w) of each before padding.
        ids: 64-bit keys.
        originals: (h, w) of each image's file.
        payload: whatever the subject needs to find and score objects.
    """

    images: Tensor
    targets: Any
    sizes: list[tuple[int, int]]
    ids: list[int]
    originals: list[tuple[int, int]]
    payload: Any = None


class Subject(Protocol):
    """A net with its images, its loss and its metric.

    Attributes:
        victim: gives ``features``, ``cls_loss`` and ``joint(batch)``, maps and class loss from one forward.
        units: what the images are.
        rgb: the channels' order.
        divisor: padded sides are multiples of it.
        batches_count: how many batches :meth:`batches` yields.
    """

    victim: Any
    units: PixelUnits
    rgb: bool
    divisor: int
    batches_count: int

    def batches(self) -> Iterator[StrengthBatch]:
        """All images, the same ones in the same order at every call."""

    def look(self, images: Tensor, batch: StrengthBatch, maps: Sequence[Tensor]) -> tuple[Tensor, list[Any]]:
        """Class loss (``[N]``, or a scalar for all) and what is found, from maps that are there already."""

    def score(self, found: list[Any]) -> dict[str, float]:
        """Metrics of what was found on all images."""
