"""What one call of an attack is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .memory import View
from .rows import take


@dataclass(frozen=True)
class Visit:
    """Images in network order, and everything that belongs to each."""

    images: Tensor
    targets: Any
    sizes: Sequence[tuple[int, int]]
    views: Sequence[View]
    ids: Sequence[int]
    epoch: int
    seed: int
    clean_maps: Sequence[Tensor] | None = None
    step: int = 0

    def rows(self, rows: Sequence[int]) -> Visit:
        """The same for some of the images."""
        maps = None if self.clean_maps is None else [take(m, rows) for m in self.clean_maps]
        targets = (
            take(self.targets, rows) if isinstance(self.targets, (list, tuple, Tensor)) else self.targets
        )
        sizes, views, ids = (take(x, rows) for x in (self.sizes, self.views, self.ids))
        return Visit(
            take(self.images, rows), targets, sizes, views, ids, self.epoch, self.seed, maps, self.step
        )
