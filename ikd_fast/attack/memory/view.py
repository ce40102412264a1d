"""Where a view of an image lies in the image its perturbation is kept for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ikd_fast.kernels.reference.delta_codes import CellMap

Size = tuple[int, int]

EDGE = 1e-3
"""Canonical pixels: a centre this near to a pixel's upper edge belongs to the next one. A loader's float32 matrix puts centres that
lie on an edge (shrinking by 2 has them all there) up to 3e-4 to either side of it."""


@dataclass(frozen=True)
class View:
    """An axis-aligned map from the canonical image to what a net sees of it in one step.

    Pixel *edges* are mapped: ``x_view = sx * x + ox``, pixel ``i`` covering ``[i, i + 1)``, so a mirror of a view of width w is
    ``x' = w - x``. View pixel ``j`` shows the canonical pixel that holds its centre ``j + 0.5``. Every operation returns a new
    view; numbers are float64.

    Args:
        canonical: (H, W) of the image the perturbation is kept for, pixels.
        size: (h, w) of the view, pixels.
        scale: (sy, sx) view pixels per canonical pixel; negative where the axis is mirrored.
        offset: (oy, ox) view pixels.

    Raises:
        ValueError: sides below 1, a scale of zero, numbers that are not finite.

    >>> view = View.identity((4, 6)).crop((2, 0, 6, 4)).flip()
    >>> view.size, view.scale, view.offset
    ((4, 4), (1.0, -1.0), (0.0, 6.0))
    >>> view.cells(stride=1).x_cell.tolist()
    [5, 4, 3, 2]
    >>> view.resize((4, 8)).cells(stride=2, frame=(4, 9)).x_cell.tolist()
    [2, 2, 2, 2, 1, 1, 1, 1, -1]
    """

    canonical: Size
    size: Size
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for name in ("canonical", "size"):
            pair = tuple(int(v) for v in getattr(self, name))
            if len(pair) != 2 or min(pair) < 1:
                raise ValueError(f"a view's {name} must be (height, width) of at least 1 pixel, got {pair}")
            object.__setattr__(self, name, pair)
        for name in ("scale", "offset"):
            values = tuple(float(v) for v in getattr(self, name))
            if len(values) != 2 or not all(map(math.isfinite, values)):
                raise ValueError(f"a view's {name} must be two finite numbers (y, x), got {values}")
            object.__setattr__(self, name, values)
        if 0.0 in self.scale:
            raise ValueError(f"a view's scale must not be zero, got {self.scale}")

    @classmethod
    def identity(cls, size: Size) -> View:
        """The image itself, (height, width)."""
        return cls(size, size)

    @classmethod
    def from_homography(cls, matrix: Any, canonical: Size, size: Size) -> View:
        """Of a ``[3, 3]`` matrix from canonical to view pixel edges, as mmdet's transforms write it.

        Raises:
            ValueError: the matrix shears, rotates or projects (the entry is named), or is not finite.
        """
        m = np.asarray(matrix, dtype=np.float64)
        if m.shape != (3, 3) or not np.isfinite(m).all():
            raise ValueError(
                f"a homography must be a finite [3, 3] matrix, got {list(m.shape)}: {m.tolist()}"
            )
        (height, width), across = canonical, (canonical[1], canonical[0])
        if m[2, 2] == 0:
            raise ValueError(f"a homography's entry [2][2] must not be 0, got {m.tolist()}")
        m = m / m[2, 2]
        # How far the entry moves a pixel of the view at the canonical image's far corner.
        reach = {
            (0, 1): abs(m[0, 1]) * height,
            (1, 0): abs(m[1, 0]) * width,
            **{(2, k): abs(m[2, k]) * across[k] * max(size) for k in (0, 1)},
        }
        for (i, k), pixels in reach.items():
            if pixels > 0.05:
                kind = "projects" if i == 2 else "rotates or shears"
                raise ValueError(
                    f"a perturbation that is kept follows its image through resize, crop and flip only; this homography {kind}: "
                    f"entry [{i}][{k}] is {m[i, k]:g}, expected 0. Take that transform out of the pipeline, or write mode='single', "
                    f"which keeps nothing. The matrix: {m.round(4).tolist()}"
                )
        return cls(canonical, size, scale=(m[1, 1], m[0, 0]), offset=(m[1, 2], m[0, 2]))

    def crop(self, window: tuple[int, int, int, int]) -> View:
        """The window x0, y0, x1, y1 in this view's pixels; it may reach beyond the view."""
        x0, y0, x1, y1 = (int(v) for v in window)
        (oy, ox) = self.offset
        return replace(self, size=(y1 - y0, x1 - x0), offset=(oy - y0, ox - x0))

    def flip(self, horizontal: bool = True, vertical: bool = False) -> View:
        """Mirrored within its own size."""
        scale, offset = list(self.scale), list(self.offset)
        for axis, asked in enumerate((vertical, horizontal)):
            if asked:
                scale[axis], offset[axis] = -scale[axis], self.size[axis] - offset[axis]
        return replace(self, scale=_pair(scale), offset=_pair(offset))

    def resize(self, size: Size) -> View:
        """Stretched to (height, width)."""
        ratio = [new / old for new, old in zip(size, self.size, strict=True)]
        scale = _pair(s * r for s, r in zip(self.scale, ratio, strict=True))
        offset = _pair(o * r for o, r in zip(self.offset, ratio, strict=True))
        return replace(self, size=size, scale=scale, offset=offset)

    def from_resized(self, canonical: Size) -> View:
        """The same view where the canonical image is resized to (height, width) before anything is kept for it."""
        ratio = [new / old for new, old in zip(canonical, self.canonical, strict=True)]
        scale = _pair(s / r for s, r in zip(self.scale, ratio, strict=True))
        return replace(self, canonical=canonical, scale=scale)

    def cells(self, stride: int, frame: Size | None = None) -> CellMap:
        """The view as integer tables for the kernels.

        Args:
            stride: canonical pixels a side of a cell.
            frame: (Hv, Wv) of the padded batch; default the view's own size.

        Raises:
            ValueError: the frame is smaller than the view.
        """
        frame = self.size if frame is None else (int(frame[0]), int(frame[1]))
        if stride < 1:
            raise ValueError(f"stride must be at least 1 canonical pixel, got {stride}")
        if frame[0] < self.size[0] or frame[1] < self.size[1]:
            raise ValueError(f"the batch frame must hold the view of {self.size}, got {frame}")
        y_cell, y_span = self._axis(0, stride, frame[0])
        x_cell, x_span = self._axis(1, stride, frame[1])
        return CellMap(
            cells=(len(y_span), len(x_span)), x_cell=x_cell, y_cell=y_cell, x_span=x_span, y_span=y_span
        )

    def _axis(self, axis: int, stride: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cell of each of ``length`` view positions, and the positions ``[start, stop)`` of each cell."""
        extent, shown = self.canonical[axis], self.size[axis]
        scale, offset = self.scale[axis], self.offset[axis]
        pixel = np.floor((np.arange(shown) + (0.5 - offset)) / scale + EDGE)
        inside = np.flatnonzero((pixel >= 0) & (pixel < extent))
        cell = np.full(length, -1, dtype=np.int32)
        cell[inside] = pixel[inside] // stride
        count = -(-extent // stride)
        span = np.zeros((count, 2), dtype=np.int32)
        if len(inside):
            # Positions inside are one run, along which cells only rise or only fall.
            first, run = int(inside[0]), cell[inside]
            order = run if scale > 0 else run[::-1]
            edges = np.searchsorted(order, np.arange(count + 1))
            start, stop = edges[:-1], edges[1:]
            if scale < 0:
                start, stop = len(run) - stop, len(run) - start
            read = stop > start
            span[read, 0], span[read, 1] = start[read] + first, stop[read] + first
            self._unread(span, np.flatnonzero(~read), axis, stride)
        return torch.from_numpy(cell), torch.from_numpy(span)

    def _unread(self, span: np.ndarray, cells: np.ndarray, axis: int, stride: int) -> None:
        """Cells that no position reads are moved by the one position their centre falls into, where the view has it."""
        low = cells * stride
        centre = (low + np.minimum(low + stride, self.canonical[axis])) / 2
        edge, exact = EDGE * abs(self.scale[axis]), self.scale[axis] * centre + self.offset[axis]
        # On a border, the same pixel of the picture whether it is mirrored or not.
        position = np.floor(exact + edge) if self.scale[axis] > 0 else np.ceil(exact - edge) - 1
        seen = (position >= 0) & (position < self.size[axis])
        span[cells[seen], 0], span[cells[seen], 1] = position[seen], position[seen] + 1


def _pair(values: Iterable[float]) -> tuple[float, float]:
    y, x = values
    return y, x
