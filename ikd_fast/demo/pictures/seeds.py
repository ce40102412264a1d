"""AP of every seed, mean and interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ikd_fast.demo.pictures.colours import COLOURS
from ikd_fast.demo.plan import TITLES
from ikd_fast.demo.summary import gather
from ikd_fast.intervals import spread
from ikd_fast.pictures.canvas import figure, save


def draw_seeds(path: Path, results: dict[int, dict[str, Any]]) -> Path:
    """Validation AP50 and AP: a dot a seed, mean and 95 % interval beside it; the teacher, one net, as a line."""
    points = gather(results)
    students = [name for name in points if name != "teacher"]
    fig = figure(10, 4.2)
    for ax, metric in zip(fig.subplots(1, 2), ("AP50", "AP"), strict=True):
        for x, name in enumerate(students):
            values = 100 * np.array(points[name][metric])
            mean, low, high = spread(values.tolist())
            ax.scatter(np.full(len(values), x - 0.08), values, color=COLOURS[name], s=28, zorder=3)
            ax.errorbar(
                [x + 0.08],
                [mean],
                [[mean - low], [high - mean]],
                color=COLOURS[name],
                fmt="_",
                ms=14,
                capsize=5,
                lw=2,
            )
        ax.axhline(
            100 * points["teacher"][metric][0], color=COLOURS["teacher"], ls="--", lw=1, label="teacher"
        )
        ax.set_xticks(range(len(students)), [TITLES[name].replace(" + ", "\n+ ", 1) for name in students])
        ax.set_xlim(-0.5, len(students) - 0.5)
        ax.set_ylabel(f"validation {metric}, %")
        ax.grid(axis="y", alpha=0.3)
        ax.legend(fontsize=8)
    fig.suptitle(f"{len(results)} seeds: dots, mean and 95 % interval (Student's t)", fontsize=10)
    return save(fig, path)
