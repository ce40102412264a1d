"""A metric against beta, a line for each attack, the run without adversarial branch as a band."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .canvas import figure, save

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's, without yellow and black."""
MARKERS = "osD^vP"
DODGE = 1.06
"""Factor in beta between neighbouring lines, so that points of equal beta do not cover each other."""


def draw_sweep(path: Path, summary: Mapping[str, Any]) -> Path:
    """Save :func:`sweep_figure` of what :func:`ikd_fast.mmdet.sweep.summary.summarise` returns."""
    return save(sweep_figure(summary), path)


def sweep_figure(summary: Mapping[str, Any]) -> Figure:
    """One panel a metric (two at most): a faint dot a seed, mean and 95 % interval; settings that failed are named in the title."""
    names = summary["metrics"][:2]
    attacks = list(dict.fromkeys((r["mode"], r["eps"]) for r in summary["settings"] if r["mode"] is not None))
    fig = figure(5.4 * len(names), 4.4)
    for ax, name in zip(fig.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _baseline(ax, summary, name)
        for i, (mode, eps) in enumerate(attacks):
            rows = [r for r in summary["settings"] if (r["mode"], r["eps"]) == (mode, eps)]
            shift = DODGE ** (i - (len(attacks) - 1) / 2)
            _line(ax, rows, name, shift, COLOURS[i % 6], MARKERS[i % 6], f"{mode}, eps {eps:g}")
        betas = sorted({r["beta"] for r in summary["settings"] if r["mode"] is not None})
        if betas:
            ax.set_xscale("log")
            ax.set_xticks(betas, [f"{b:g}" for b in betas])
            ax.minorticks_off()
            ax.set_xlim(betas[0] / 2, betas[-1] * 2)
        ax.set_xlabel("beta")
        ax.set_ylabel(f"{name}, %")
        ax.grid(alpha=0.3)
        # Below: inside it would cover points.
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False)
    count = len(summary["seeds"])
    seeds = (
        f"{count} seeds: dots, mean and 95 % interval (Student's t)" if count > 1 else "one seed: no interval"
    )
    failed = [
        r["title"] for r in summary["settings"] if any(x["status"] != "done" for x in r["runs"].values())
    ]
    note = f"\nwith failed runs: {'; '.join(failed)}" if failed else ""
    fig.suptitle(f"{summary['config']}, {summary['length']}. {seeds}{note}", fontsize=9)
    return fig


def _baseline(ax: Axes, summary: Mapping[str, Any], name: str) -> None:
    for row in summary["settings"]:
        score = row["scores"][name]
        if row["mode"] is None and score["mean"] is not None:
            ax.axhline(100 * score["mean"], color="black", ls="--", lw=1.2, label=row["title"])
            if score["interval95"] is not None:
                low, high = score["interval95"]
                ax.axhspan(100 * low, 100 * high, color="black", alpha=0.08, lw=0)


def _line(
    ax: Axes, rows: list[Mapping[str, Any]], name: str, shift: float, colour: str, marker: str, label: str
) -> None:
    rows = sorted((r for r in rows if r["scores"][name]["mean"] is not None), key=lambda r: r["beta"])
    x = [r["beta"] * shift for r in rows]
    means = [100 * r["scores"][name]["mean"] for r in rows]
    ax.plot(x, means, color=colour, lw=1.6, marker=marker, ms=5, label=label)
    for at, row, mean in zip(x, rows, means, strict=True):
        score = row["scores"][name]
        ax.scatter(
            [at] * len(score["points"]),
            [100 * p for p in score["points"]],
            color=colour,
            s=18,
            alpha=0.45,
            lw=0,
        )
        if score["interval95"] is not None:
            low, high = (100 * v for v in score["interval95"])
            ax.errorbar([at], [mean], [[mean - low], [high - mean]], color=colour, capsize=4, lw=1.2)
