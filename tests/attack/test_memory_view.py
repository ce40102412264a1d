"""Views: chains of flips, crops and resizes against walks of exact points and of pixels."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest

from ikd_fast.attack.memory import View

HALF = Fraction(1, 2)
EDGE = Fraction(1, 1000)  # as documented: a centre this close below a border belongs beyond it


def chain(seed: int, *, resizes: bool = True):
    """A canonical size and random operations ``(name, argument)`` on it."""
    rng = random.Random(seed)
    h, w = canonical = rng.randint(5, 40), rng.randint(5, 40)
    steps = []
    for _ in range(rng.randint(1, 6)):
        kind = rng.choice(["crop", "flip", "resize"] if resizes else ["crop", "flip"])
        if kind == "crop":
            x0, y0 = rng.randint(0, w - 1), rng.randint(0, h - 1)
            x1, y1 = rng.randint(x0 + 1, w), rng.randint(y0 + 1, h)
            steps.append((kind, (x0, y0, x1, y1)))
            h, w = y1 - y0, x1 - x0
        elif kind == "flip":
            steps.append((kind, (rng.random() < 0.5, rng.random() < 0.5)))
        else:
            h, w = rng.randint(1, 60), rng.randint(1, 60)
            steps.append((kind, (h, w)))
    return canonical, steps


def walk(canonical, steps):
    """The view, and per axis a function from exact view points to exact canonical points, undone step by step."""
    view = View.identity(canonical)
    undo = ([], [])
    for kind, argument in steps:
        h, w = view.size
        for axis, side in enumerate((h, w)):
            if kind == "crop":
                undo[axis].append(lambda p, a=argument[1 - axis]: p + a)
            elif kind == "flip" and argument[1 - axis]:
                undo[axis].append(lambda p, s=side: s - p)
            elif kind == "resize":
                undo[axis].append(lambda p, s=side, n=argument[axis]: p * Fraction(s, n))
        view = view.flip(*argument) if kind == "flip" else getattr(view, kind)(argument)

    def back(axis):
        def point(p):
            for step in reversed(undo[axis]):
                p = step(p)
            return p

        return point

    return view, (back(0), back(1))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("seed", range(60))
def test_cells_of_any_chain_are_those_of_its_points(seed, stride):
    """Pixel j of the view reads the canonical pixel that holds its centre, found in exact fractions, one step at a time."""
    canonical, steps = chain(seed)
    view, back = walk(canonical, steps)
    frame = (view.size[0] + 3, view.size[1])
    table = view.cells(stride, frame)
    assert table.cells == tuple(-(-side // stride) for side in canonical)
    for axis, (cell, span) in enumerate(((table.y_cell, table.y_span), (table.x_cell, table.x_span))):
        expected = [math.floor(back[axis](j + HALF) + EDGE) // stride for j in range(view.size[axis])]
        assert cell.tolist() == expected + [-1] * (frame[axis] - view.size[axis])
        for i, (start, stop) in enumerate(span.tolist()):
            readers = [j for j, c in enumerate(expected) if c == i]
            if readers:
                assert list(range(start, stop)) == readers
            else:
                # Not read: moved by the pixel its centre falls into, where that is in the view.
                low, high = i * stride, min((i + 1) * stride, canonical[axis])
                centre = Fraction(low + high, 2)
                pixels = [
                    sorted((back[axis](Fraction(j)), back[axis](Fraction(j + 1))))
                    for j in range(view.size[axis])
                ]
                holding = [j for j, (left, right) in enumerate(pixels) if left <= centre + EDGE < right]
                assert [start, stop] == ([holding[0], holding[0] + 1] if holding else [0, 0])


@pytest.mark.parametrize("seed", range(30))
def test_flips_and_crops_move_pixels_as_arrays_do(seed):
    (height, width), steps = chain(seed, resizes=False)
    y, x = np.mgrid[:height, :width]
    image = y * 1000 + x
    view, _ = walk((height, width), steps)
    for kind, argument in steps:
        if kind == "crop":
            x0, y0, x1, y1 = argument
            image = image[y0:y1, x0:x1]
        else:
            image = image[:: -1 if argument[1] else 1, :: -1 if argument[0] else 1]
    table = view.cells(1)
    assert np.array_equal(image, table.y_cell.numpy()[:, None] * 1000 + table.x_cell.numpy())


def test_whole_resizes_repeat_pixels():
    table = View.identity((3, 2)).resize((6, 6)).cells(1)
    assert table.y_cell.tolist() == [0, 0, 1, 1, 2, 2]
    assert table.x_cell.tolist() == [0, 0, 0, 1, 1, 1]
    assert table.x_span.tolist() == [[0, 3], [3, 6]]


def test_a_halved_view_reads_every_other_pixel_and_moves_all():
    """Centres lie on borders: the pixel above is read, mirrored or not; the others are moved by the pixel they are under."""
    view = View.identity((1, 6)).resize((1, 3))
    plain, mirror = view.cells(1), view.flip().cells(1)
    assert plain.x_cell.tolist() == [1, 3, 5]
    assert mirror.x_cell.tolist() == [5, 3, 1]
    assert plain.x_span.tolist() == [[0, 1], [0, 1], [1, 2], [1, 2], [2, 3], [2, 3]]
    assert mirror.x_span.tolist() == [[2, 3], [2, 3], [1, 2], [1, 2], [0, 1], [0, 1]]


def test_float32_matrices_do_not_move_ties():
    """Rounded to float32, as mmdet keeps them, scales and offsets read the same pixels."""
    seen = 0
    for seed in range(40):
        canonical, steps = chain(seed)
        canonical = tuple(side * 50 for side in canonical)
        view = View.identity(canonical)
        for kind, argument in steps:
            argument = argument if kind == "flip" else tuple(v * 50 for v in argument)
            view = view.flip(*argument) if kind == "flip" else getattr(view, kind)(argument)
        (sy, sx), (oy, ox) = view.scale, view.offset
        matrix = np.array([[sx, 0, ox], [0, sy, oy], [0, 0, 1]], dtype=np.float32)
        if min(abs(sy), abs(sx)) < 0.1 or max(abs(oy), abs(ox)) > 4000:
            continue  # beyond what loaders make, float32 has not the digits
        again = View.from_homography(matrix, canonical, view.size).cells(1)
        exact = view.cells(1)
        assert again.x_cell.tolist() == exact.x_cell.tolist(), seed
        assert again.y_cell.tolist() == exact.y_cell.tolist(), seed
        seen += 1
    assert seen > 20


def test_beyond_the_canonical_image_there_is_nothing():
    table = View.identity((4, 4)).crop((-2, -1, 5, 4)).cells(1)
    assert table.x_cell.tolist() == [-1, -1, 0, 1, 2, 3, -1]
    assert table.x_span.tolist() == [[2, 3], [3, 4], [4, 5], [5, 6]]
    far = View.identity((4, 4)).crop((10, 0, 12, 4)).cells(2)
    assert far.x_cell.tolist() == [-1, -1]
    assert far.x_span.tolist() == [[0, 0], [0, 0]]


def test_a_canonical_image_that_is_itself_resized():
    """The view of an 8 x 8 file shown at 4 x 4 is the identity of the 4 x 4 image."""
    view = View.identity((8, 8)).resize((4, 4)).from_resized((4, 4))
    assert view == View.identity((4, 4))
    assert view.flip().crop((0, 1, 3, 4)).cells(1).x_cell.tolist() == [3, 2, 1]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((0, 1), r"rotates or shears: entry \[0\]\[1\] is 0\.1"),
        ((1, 0), r"\[1\]\[0\]"),
        ((2, 0), r"projects: entry \[2\]\[0\]"),
    ],
)
def test_other_maps_are_refused_by_entry(entry, message):
    matrix = np.eye(3)
    matrix[entry] = 0.1
    with pytest.raises(ValueError, match=message):
        View.from_homography(matrix, (10, 10), (10, 10))


def test_wrong_numbers_are_named():
    with pytest.raises(ValueError, match=r"canonical must be \(height, width\)"):
        View((0, 4), (4, 4))
    with pytest.raises(ValueError, match="scale must not be zero"):
        View((4, 4), (4, 4), scale=(0, 1))
    with pytest.raises(ValueError, match="offset must be two finite"):
        View((4, 4), (4, 4), offset=(float("nan"), 0))
    with pytest.raises(ValueError, match=r"frame must hold the view of \(4, 4\), got \(4, 3\)"):
        View.identity((4, 4)).cells(1, (4, 3))
    with pytest.raises(ValueError, match=r"size must be .* got \(4, 0\)"):
        View.identity((4, 4)).crop((2, 0, 2, 4))
    with pytest.raises(ValueError, match=r"finite \[3, 3\]"):
        View.from_homography(np.full((3, 3), np.nan), (4, 4), (4, 4))
