"""Losses over the steps of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from ikd_fast.demo.pictures.colours import COLOURS
from ikd_fast.demo.plan import STUDENTS, TITLES
from ikd_fast.mmdet.history import read_history
from ikd_fast.pictures.canvas import figure, save

DETECTION = ("loss_cls", "loss_bbox")
STYLES = ("-", "--", ":", "-.")


def draw_losses(path: Path, out: Path, seed: int) -> Path:
    """Left: detection loss of each student. Right: its weighted distillation terms. Faint: steps; bold: mean of 10."""
    fig = figure(11, 4.2)
    left, right = fig.subplots(1, 2)
    for name in STUDENTS:
        rows = read_history(out / "work" / f"seed{seed}" / name)
        _curve(left, [sum(row[key] for key in DETECTION) for row in rows], TITLES[name], COLOURS[name], "-")
        terms = sorted({key for row in rows for key in row if key.startswith("loss_kd/")})
        for term, style in zip(terms, STYLES, strict=False):
            values = [row.get(term, np.nan) for row in rows]
            _curve(right, values, f"{TITLES[name]}: {term.removeprefix('loss_')}", COLOURS[name], style)
    left.set_title("Detection loss (class + box) on training crops", fontsize=10)
    right.set_title("Distillation terms, weighted as they are added to it", fontsize=10)
    for ax in (left, right):
        ax.set_xlabel("step")
        ax.set_ylabel("loss")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    right.set_yscale("log")
    return save(fig, path)


def smooth(values: Sequence[float], width: int = 10) -> np.ndarray:
    """Mean of each value and up to ``width - 1`` before it; missing values stay missing.

    >>> smooth([1.0, 3.0, 5.0], width=2).tolist()
    [1.0, 2.0, 4.0]
    """
    data = np.asarray(values, dtype=float)
    return np.array([np.mean(data[max(0, i - width + 1) : i + 1]) for i in range(len(data))])


def _curve(ax: Axes, values: Sequence[float], label: str, colour: str, style: str) -> None:
    steps = np.arange(1, len(values) + 1)
    ax.plot(steps, values, color=colour, alpha=0.2, lw=0.8)
    ax.plot(steps, smooth(values), color=colour, ls=style, lw=1.8, label=label)
