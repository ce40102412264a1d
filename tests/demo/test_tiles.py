"""Tiles and clipped boxes against hand-computed cases and the properties they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikd_fast.demo.tiles import Rect, clip_boxes, covering_tiles, disjoint_tiles, split_columns


def test_split_is_one_vertical_line() -> None:
    left, right = split_columns(2299, 2472)
    assert left == Rect(0, 0, 1724, 2472)  # 0.75 * 2299 = 1724.25
    assert right == Rect(1724, 0, 2299, 2472)
    assert not left.overlaps(right)


def test_covering_tiles_by_hand() -> None:
    tiles = covering_tiles(Rect(0, 0, 700, 500), 384, 256)
    # free width 316 -> 1 + ceil(316/256) = 3 columns at 0, 158, 316; free height 116 -> 2 rows at 0, 116
    assert [(t.x1, t.y1) for t in tiles] == [(0, 0), (158, 0), (316, 0), (0, 116), (158, 116), (316, 116)]
    assert all((t.width, t.height) == (384, 384) for t in tiles)


def test_disjoint_tiles_leave_the_gap_on_the_left() -> None:
    tiles = disjoint_tiles(Rect(1724, 0, 2299, 600), 256)
    # 575 px hold 2 tiles and 63 px are left, on the side of the training part; 600 px hold 2 and 88 px are left on top
    assert tiles == [
        Rect(1787, 88, 2043, 344),
        Rect(2043, 88, 2299, 344),
        Rect(1787, 344, 2043, 600),
        Rect(2043, 344, 2299, 600),
    ]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(40, 400), st.integers(40, 400))
def test_every_pixel_is_covered_and_no_tile_leaves(width: int, height: int, side: int, stride: int) -> None:
    stride = min(stride, side)
    area = Rect(7, 3, 7 + width, 3 + height)
    tiles = covering_tiles(area, side, stride)
    for low, high, ends in (
        (area.x1, area.x2, {(t.x1, t.x2) for t in tiles}),
        (area.y1, area.y2, {(t.y1, t.y2) for t in tiles}),
    ):
        covered = np.zeros(high - low, bool)
        for a, b in ends:
            assert low <= a < b <= high
            covered[a - low : b - low] = True
        assert covered.all()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 900), st.integers(0, 900), st.integers(20, 300))
def test_disjoint_tiles_share_no_pixel(width: int, height: int, side: int) -> None:
    area = Rect(5, 9, 5 + width, 9 + height)
    tiles = disjoint_tiles(area, side)
    assert len(tiles) == (width // side) * (height // side)
    assert len({(t.x1, t.y1) for t in tiles}) == len(tiles)
    assert all((t.x2 - area.x2) % side == 0 and (t.y2 - area.y2) % side == 0 for t in tiles)
    assert all(t.x1 >= area.x1 and t.y1 >= area.y1 for t in tiles)


def test_clip_by_hand() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [8, 8, 18, 18], [4, 0, 14, 10], [30, 30, 40, 40]])
    clipped, keep = clip_boxes(boxes, Rect(5, 0, 25, 12), min_kept=0.4)
    # 50 % of the first is left, 10 x 4 = 40 % of the second, 90 % of the third, nothing of the last
    assert keep.tolist() == [0, 1, 2]
    assert clipped.tolist() == [[0, 0, 5, 10], [3, 8, 13, 12], [0, 0, 9, 10]]


@pytest.mark.parametrize(("min_kept", "kept"), [(0.5, 1), (0.5001, 0)])
def test_the_share_is_a_lower_bound(min_kept: float, kept: int) -> None:
    assert len(clip_boxes(np.array([[0.0, 0, 10, 10]]), Rect(5, 0, 20, 20), min_kept)[1]) == kept


def test_no_boxes() -> None:
    clipped, keep = clip_boxes(np.zeros((0, 4)), Rect(0, 0, 5, 5))
    assert clipped.shape == (0, 4)
    assert keep.shape == (0,)
