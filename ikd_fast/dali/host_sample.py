"""One image on its way to DALI: what the host knows of it and what is to be done to its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ikd_fast.attack.memory import View

from .steps import Step, view_of


@dataclass
class HostSample:
    """An encoded image with its geometry and its targets.

    Attributes:
        path: the file, for messages.
        encoded: its bytes, uint8 ``[n]``.
        size: (h, w) of the image in it.
        steps: what is done to it, see :mod:`ikd_fast.dali.steps`.
        gain: factor of the grey levels, rounded and clipped to 0..255; 1 for none.
        sigma: noise to add, grey levels; mirror: whether the output is to be mirrored after that. Of whoever finishes the batch.
        stand_in: whether it comes in place of images that cannot be used.
        payload: what comes back beside the pixels.
    """

    path: str
    encoded: np.ndarray
    size: tuple[int, int]
    steps: Sequence[Step] = ()
    gain: float = 1.0
    sigma: float = 0.0
    mirror: bool = False
    stand_in: bool = False
    payload: Any = field(default=None, repr=False)

    @property
    def view(self) -> View:
        """Where each output pixel comes from: all steps in one axis-aligned map."""
        return view_of(self.size, self.steps)

    @property
    def region(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 (y, x) in source pixels of the output's first and last edge; the last lies before the first on a mirrored axis."""
        view = self.view
        ends = np.array([[0, 0], view.size], dtype=np.float64)
        first, last = (ends - view.offset) / view.scale
        return first.astype(np.float32), last.astype(np.float32)


@dataclass(frozen=True)
class Skipped:
    """An image that could not be used."""

    path: str
    reason: str
