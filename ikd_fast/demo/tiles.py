"""Rectangles, tile grids and boxes clipped to a tile. All coordinates are pixels, ``x2`` and ``y2`` exclusive."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MIN_KEPT = 0.4
"""A box cut by a tile border stays if at least this share of its area is inside the tile."""


class Rect(NamedTuple):
    """A rectangle of integer pixels.

    >>> Rect(0, 0, 10, 5).overlaps(Rect(10, 0, 20, 5))
    False
    """

    x1: int
    y1: int
    x2: int
    y2: int

    @property
    def width(self) -> int:
        return self.x2 - self.x1

    @property
    def height(self) -> int:
        return self.y2 - self.y1

    def overlaps(self, other: Rect) -> bool:
        """Whether the two share at least one pixel."""
        return min(self.x2, other.x2) > max(self.x1, other.x1) and min(self.y2, other.y2) > max(
            self.y1, other.y1
        )


def split_columns(width: int, height: int, train: float = 0.75) -> tuple[Rect, Rect]:
    """Cut an image by one vertical line into its left (train) and right (validation) part.

    >>> split_columns(100, 40)
    (Rect(x1=0, y1=0, x2=75, y2=40), Rect(x1=75, y1=0, x2=100, y2=40))
    """
    line = round(width * train)
    return Rect(0, 0, line, height), Rect(line, 0, width, height)


def covering_tiles(area: Rect, side: int, stride: int) -> list[Rect]:
    """Square tiles that cover ``area``, neighbours at most ``stride`` apart and evenly spread, row by row.

    A side of ``area`` shorter than ``side`` gives tiles of that shorter length.

    >>> [(t.x1, t.x2) for t in covering_tiles(Rect(0, 0, 700, 384), 384, 256)]
    [(0, 384), (158, 542), (316, 700)]
    """
    xs, ys = _starts(area.x1, area.x2, side, stride), _starts(area.y1, area.y2, side, stride)
    return [Rect(x, y, min(x + side, area.x2), min(y + side, area.y2)) for y in ys for x in xs]


def _starts(low: int, high: int, side: int, stride: int) -> list[int]:
    free = max(high - low - side, 0)
    count = 1 + -(-free // stride)
    return [low] if count == 1 else [low + round(i * free / (count - 1)) for i in range(count)]


def disjoint_tiles(area: Rect, side: int) -> list[Rect]:
    """Whole ``side`` x ``side`` tiles that do not overlap, packed against the right and lower border.

    What does not fill a tile is left out on the left and the top; on the left it is a gap to the training part.

    >>> disjoint_tiles(Rect(75, 0, 100, 12), 10)
    [Rect(x1=80, y1=2, x2=90, y2=12), Rect(x1=90, y1=2, x2=100, y2=12)]
    """
    xs = range(area.x2 - area.width // side * side, area.x2, side)
    ys = range(area.y2 - area.height // side * side, area.y2, side)
    return [Rect(x, y, x + side, y + side) for y in ys for x in xs]


def clip_boxes(boxes: np.ndarray, tile: Rect, min_kept: float = MIN_KEPT) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in the tile's own coordinates, and which of the given boxes they are.

    A box is clipped to the tile and kept if at least ``min_kept`` of its area remains.

    Args:
        boxes: ``[n,4]`` xyxy in the coordinates of the whole image.
        tile: the window.
        min_kept: share of the area in 0..1.

    Returns:
        ``[k,4]`` float64 clipped boxes and ``[k]`` int indices into ``boxes``.

    >>> boxes = np.array([[0.0, 0, 10, 10], [8, 0, 18, 10]])
    >>> clip_boxes(boxes, Rect(5, 0, 25, 20))[0].tolist()
    [[0.0, 0.0, 5.0, 10.0], [3.0, 0.0, 13.0, 10.0]]
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    clipped = boxes.copy()
    clipped[:, 0::2] = clipped[:, 0::2].clip(tile.x1, tile.x2) - tile.x1
    clipped[:, 1::2] = clipped[:, 1::2].clip(tile.y1, tile.y2) - tile.y1
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = (clipped[:, 2] - clipped[:, 0]) * (clipped[:, 3] - clipped[:, 1])
    keep = np.flatnonzero((left > 0) & (left >= min_kept * area))
    return clipped[keep], keep
