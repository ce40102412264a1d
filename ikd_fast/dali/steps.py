"""What is done to an image's pixels, as numbers that go through a graph: crops, resizes and mirrors, one row each.

The rows are the truth. DALI's resize takes them as one axis-aligned map, :func:`view_of`; cv2 one after the other,
:func:`run`, which is what a pipeline on cv2 does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ikd_fast.attack.memory import View

Step = tuple[int, int, int, int, int]
CROP, RESIZE, MIRROR = range(3)
WRONG_SIZE = "its head says"
"""How the error of an image of another size begins."""


def crop(window: Sequence[int]) -> Step:
    """Window ``x1, y1, x2, y2`` in pixels of the image as it is by then."""
    x1, y1, x2, y2 = map(int, window)
    return CROP, x1, y1, x2, y2


def resize(size: Sequence[int]) -> Step:
    """To (h, w), linearly, not antialiased, centres at half pixels."""
    height, width = map(int, size)
    return RESIZE, height, width, 0, 0


def mirror(*, horizontal: bool, vertical: bool) -> Step:
    """Along x, along y, or both."""
    return MIRROR, int(horizontal), int(vertical), 0, 0


def view_of(size: tuple[int, int], steps: Iterable[Step]) -> View:
    """The map of ``steps`` on an image of ``size`` (h, w).

    >>> view_of((4, 6), [resize((8, 12)), crop((2, 0, 6, 4)), mirror(horizontal=True, vertical=False)])
    View(canonical=(4, 6), size=(4, 4), scale=(2.0, -2.0), offset=(0.0, 6.0))
    """
    view = View.identity(size)
    for kind, *numbers in steps:
        if kind == CROP:
            view = view.crop((numbers[0], numbers[1], numbers[2], numbers[3]))
        elif kind == RESIZE:
            view = view.resize((numbers[0], numbers[1]))
        else:
            view = view.flip(bool(numbers[0]), bool(numbers[1]))
    return view


def table(size: tuple[int, int], steps: Iterable[Step]) -> np.ndarray:
    """int32 ``[n, 5]`` for :func:`run`; the first row is ``size``, which the decoded image must have."""
    return np.array([crop((0, 0, size[1], size[0])), *steps], dtype=np.int32)


def run(image: np.ndarray, rows: np.ndarray, gain: float = 1.0) -> np.ndarray:
    """uint8 ``[H, W, 3]`` through the rows of a :func:`table`, by cv2; its grey levels times ``gain``, rounded and clipped.

    Raises:
        ValueError: the image has another size than the table is for.
    """
    import cv2

    expected = (int(rows[0][4]), int(rows[0][3]))
    if image.shape[:2] != expected:
        raise ValueError(
            f"{WRONG_SIZE} {expected[0]} x {expected[1]} pixels (height x width), decoded it has {image.shape[0]} x {image.shape[1]}"
        )
    for kind, a, b, c, d in rows[1:].tolist():
        if kind == CROP:
            image = image[b:d, a:c]
        elif kind == RESIZE:
            image = cv2.resize(image, (b, a), interpolation=cv2.INTER_LINEAR)
        else:
            image = cv2.flip(image, -1 if a and b else int(a))
    if gain != 1.0:
        levels = np.arange(256, dtype=np.float32) * np.float32(gain)
        image = cv2.LUT(np.ascontiguousarray(image), levels.round().clip(0, 255).astype(np.uint8))
    return np.ascontiguousarray(image)
