"""A result as a picture: bars of the medians with their interquartile ranges, a panel per group."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from .tables import duration, groups

OURS, PEER = "#0b6e99", "#b8bdc4"


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    panels = groups(result)
    columns = 1 if len(panels) < 4 else 2
    names = list(panels)
    columns_of = [names[i::columns] for i in range(columns)]
    # A column's panels are as high as their rows; 1.6 rows for the title and the gap.
    heights = [[len(panels[n]) + 1.9 for n in column] for column in columns_of]
    tallest = max(sum(h) for h in heights)
    fig = plt.figure(figsize=(9.5 * columns, 0.3 * tallest + 0.8), dpi=110, facecolor="white")
    for c, column in enumerate(columns_of):
        top = 1 - 0.55 / fig.get_figheight()
        for name, height in zip(column, heights[c], strict=True):
            rows = panels[name]
            unit = 0.3 / fig.get_figheight()
            body = len(rows) * unit
            top -= height * unit
            axes = fig.add_axes(((c + 0.3) / columns, top + 0.25 * unit, 0.58 / columns, body))
            _panel(axes, name, rows)
    machine, when = result["machine"], f"{result['created'][:10]}, commit {result['commit']['id'][:10]}"
    fig.text(
        0.02,
        1 - 0.35 / fig.get_figheight(),
        f"Median time per call, whiskers: interquartile range. {machine['gpu'] or machine['cpu']}, {machine['threads']} threads, {when}",
        fontsize=11,
    )
    fig.savefig(path)
    plt.close(fig)


def _panel(axes: Any, name: str, rows: list[dict[str, Any]]) -> None:
    y = range(len(rows))
    medians = [r["median"] for r in rows]
    spread = [[r["median"] - r["q1"] for r in rows], [r["q3"] - r["median"] for r in rows]]
    colours = [OURS if r["role"] == "ours" else PEER for r in rows]
    axes.barh(y, medians, height=0.62, color=colours, xerr=spread, error_kw={"lw": 1, "ecolor": "#333333"})
    longest = max(r["q3"] for r in rows)
    for i, r in enumerate(rows):
        axes.text(
            max(r["q3"], r["median"]) + 0.015 * longest, i, duration(r["median"]), va="center", fontsize=9
        )
    axes.set_xlim(0, 1.16 * longest)
    axes.set_yticks(list(y), [r["side"] for r in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(
        textwrap.shorten(name, 100, placeholder=" ..."), fontsize=9.5, loc="left", x=-0.42, fontweight="bold"
    )
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
