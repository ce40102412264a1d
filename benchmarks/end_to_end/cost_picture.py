"""The result of ``cost`` as stacked bars: where the time of a step goes, and how long the multiply-adds say it should take."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .cost_table import ratios
from .modes import PLAIN
from .timeline import PARTS

COLOURS = {
    "data": "#d9d9d9", "augmentation": "#8c96a3", "teacher": "#0b6e99", "attack": "#d1495b", "student": "#66a182", "losses": "#edae49",
}  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    modes = result["modes"]
    names = list(modes)
    fig, axes = plt.subplots(figsize=(9.5, 0.36 * len(names) + 1.7), dpi=110, facecolor="white")
    left = [0.0] * len(names)
    for part in [p for p in PARTS if p != "data"]:
        widths = [statistics.median(modes[n]["parts"][part]) for n in names]
        axes.barh(range(len(names)), widths, left=left, height=0.62, color=COLOURS[part], label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    plain = statistics.median(modes[PLAIN]["seconds"]) / statistics.fmean(modes[PLAIN]["predicted"])
    expected = [plain * statistics.fmean(modes[n]["predicted"]) for n in names]
    longest = max(*left, *expected)
    for i, name in enumerate(names):
        label = "predicted" if i == 0 else None
        axes.plot([expected[i]] * 2, [i - 0.42, i + 0.42], color="black", lw=1.6, label=label)
        end = max(left[i], expected[i]) + 0.01 * longest
        axes.text(end, i, f"{ratios(result, name)['time'][1]:.2f}x", va="center", fontsize=9)
    axes.set_xlim(0, 1.1 * longest)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(
        "seconds a step (medians), and times plain FGD; black: plain FGD's time a multiply-add, times this step's",
        fontsize=8,
    )
    axes.set_title(result["title"], fontsize=9.5, loc="left")
    axes.legend(fontsize=8, frameon=False, ncols=6, loc="lower right", bbox_to_anchor=(1.0, 1.07))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)
