"""One row an image: from the loader, as the clean branch sees it, adversarial, and the perturbation enlarged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .canvas import TRUTH, draw_boxes, figure, save, show

GAIN = 10
"""How often the perturbation is drawn, around mid-grey."""

MAX_HEIGHT = 120.0
"""Inches; more rows than fit are not one picture."""


@dataclass(frozen=True)
class BranchRow:
    """One training image. Pixels are RGB ``[H, W, 3]`` in 0..255, boxes xyxy ``[n, 4]`` in the pixels they are drawn on.

    ``geo`` is the image after the crop, without noise; ``adversarial`` is None where there is no such branch.
    """

    loaded: np.ndarray
    loaded_boxes: np.ndarray
    clean: np.ndarray
    boxes: np.ndarray
    clean_title: str
    geo: np.ndarray
    adversarial: np.ndarray | None = None
    adversarial_title: str = ""


def draw_branches(path: Path, rows: Sequence[BranchRow], title: str) -> Path:
    """Draw the rows under ``title`` and save them; two columns where no row is adversarial, else four."""
    columns = 2 if all(row.adversarial is None for row in rows) else 4
    fig = figure(2.75 * columns, min(2.9 * len(rows) + 0.9, MAX_HEIGHT))
    fig.suptitle(title, fontsize=10)
    axes = fig.subplots(len(rows), columns, squeeze=False)
    for ax, row in zip(axes, rows, strict=True):
        show(ax[0], to_uint8(row.loaded), "from the loader")
        draw_boxes(ax[0], row.loaded_boxes.tolist(), TRUTH)
        show(ax[1], to_uint8(row.clean), row.clean_title)
        draw_boxes(ax[1], row.boxes.tolist(), TRUTH)
        if row.adversarial is not None:
            show(ax[2], to_uint8(row.adversarial), row.adversarial_title)
            draw_boxes(ax[2], row.boxes.tolist(), TRUTH)
            delta = row.adversarial.astype(np.float64) - row.geo
            show(ax[3], to_uint8(127.5 + GAIN * delta), f"{GAIN} x the perturbation (grey: none)")
    return save(fig, path)


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Rounded and clipped.

    >>> to_uint8(np.array([-3.0, 1.6, 300.0])).tolist()
    [0, 2, 255]
    """
    return np.asarray(pixels, dtype=np.float64).round().clip(0, 255).astype(np.uint8)
