"""Which branch, which window: NumPy on the host, since a handful of boxes costs torch its overhead ten times."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ikd_fast.kernels.reference.philox import Stream, draw

from .checks import check_choice
from .geometry import Window

Rule = str | Callable[[Tensor], str]
RULES = ("any_large", "no_small")
CROP_TRIES = 10
_FLOAT32_EPS = 2.0**-23


def wanted_branch(xyxy: np.ndarray, scale: tuple[float, float], rule: Rule, threshold: float) -> str:
    """The rule on the counted boxes (at least one, of some area) of one image: "crop", "noise" or "keep"."""
    sides = xyxy[:, 2:] - xyxy[:, :2]
    areas = sides[:, 0] * sides[:, 1] / (scale[0] * scale[1])
    if callable(rule):
        return check_choice(
            "what rule(areas) returns", rule(torch.from_numpy(areas)), ("crop", "noise", "keep")
        )
    # Each float32 coordinate may be off by two roundings (annotation, resize): so little below tau is tau.
    far = np.maximum(np.abs(xyxy[:, :2]), np.abs(xyxy[:, 2:]))
    slack = 2 * _FLOAT32_EPS * (far / sides).sum(1)
    large = areas >= threshold * (1 - slack)
    return "crop" if (large.any() if rule == "any_large" else large.all()) else "noise"


def sample_window(
    key: tuple[int, int, int], index: int, size: tuple[int, int], crop_ratio: float, align: int = 1
) -> Window:
    """Try ``index`` of the CROP stream: sides int(f*side + .5), f_h and f_w ~ U[1 - r, 1) from words 0 and 1,
    offsets int(u*(side - cropped + 1)) from words 2 (y) and 3 (x). ``key``: (seed, image id, epoch). ``align``: sides go to the
    nearest multiple of it (at least one, at most the image's side), offsets are multiples."""
    height, width = size
    u_h, u_w, u_y, u_x = draw(*key, Stream.CROP, index)
    h = int((1 - crop_ratio + crop_ratio * u_h) * height + 0.5)
    w = int((1 - crop_ratio + crop_ratio * u_w) * width + 0.5)
    h, w = (min(max((n + align // 2) // align, 1) * align, side) for n, side in ((h, height), (w, width)))
    y0, x0 = (
        int(u * ((side - n) // align + 1)) * align for u, side, n in ((u_y, height, h), (u_x, width, w))
    )
    return x0, y0, x0 + w, y0 + h


def choose_window(
    xyxy: np.ndarray,
    key: tuple[int, int, int],
    size: tuple[int, int],
    crop_ratio: float,
    min_kept: float = 0.0,
    align: int = 1,
) -> Window:
    """The first window of ten that at least one box survives (see ``geometry.kept``), else the whole image."""
    x1, y1, x2, y2 = xyxy.T
    wanted = min_kept * (x2 - x1) * (y2 - y1)
    for index in range(CROP_TRIES):
        window = left, top, right, bottom = sample_window(key, index, size, crop_ratio, align)
        inside = (x1 < right) & (x2 > left) & (y1 < bottom) & (y2 > top)
        area = (np.minimum(x2, right) - np.maximum(x1, left)) * (np.minimum(y2, bottom) - np.maximum(y1, top))
        if (inside & (area >= wanted)).any():
            return window
    return 0, 0, size[1], size[0]
