"""Strength against cost: one column an eps, gains above gradients and above measured seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ikd_fast.pictures.canvas import figure, save

from .plan import CONTROL, ITERATIVE, PGD

# Okabe and Ito.
STYLES: dict[str, tuple[str, str]] = {
    "single": ("#D55E00", "o"),
    "single, feature": ("#E69F00", "o"),
    "carry": ("#0072B2", "s"),
    "carry, feature": ("#56B4E9", "s"),
    "carry, crop_align 8": ("#332288", "v"),
    "carry, fresh": ("#CC79A7", "^"),
    ITERATIVE: ("#009E73", "D"),
    f"{ITERATIVE}, published round trip": ("#999999", "X"),
    PGD: ("#000000", "*"),
}
OWN = ("#8B4513", "P")
GRADIENTS = "gradients per image and step"
ROWS = (
    ("class_loss_gain", "gradient_evals", "class loss, gain", GRADIENTS),
    ("class_loss_gain", "seconds", "class loss, gain", "seconds per image and step"),
    ("feature_change_gain", "gradient_evals", "feature change, gain", GRADIENTS),
    ("feature_change_gain", "seconds", "feature change, gain", "seconds per image and step"),
)
SHIFT = {
    "carry": 0.76, "carry, feature": 0.86, "carry, fresh": 1.4, "carry, crop_align 8": 1.27, "single, feature": 1.14,
    f"{ITERATIVE}, published round trip": 1.16,
}  # fmt: skip
"""Modes that spend the same gradients stand side by side, not on top of one another."""


def draw_strength(path: Path, report: Mapping[str, Any]) -> Path:
    """Draw the report's rows; bars are the standard deviation over seeds, numbers the first and last measured visit of ``carry``."""
    eps = report["settings"]["eps"]
    width = max(7.5, 3.0 * len(eps) + 0.6)
    fig = figure(width, 11.5)
    axes = fig.subplots(len(ROWS), len(eps), squeeze=False, sharex="row")
    shown: dict[str, tuple[str, str]] = {}
    for column, value in enumerate(eps):
        rows = [row for row in report["rows"] if row["eps"] == value and row["name"] != CONTROL]
        for line, (gain, cost, y_title, x_title) in enumerate(ROWS):
            ax = axes[line][column]
            shown |= _panel(ax, rows, gain, cost)
            ax.set_xlabel(x_title, fontsize=8)
            if column == 0:
                ax.set_ylabel(f"{y_title}\nover random signs", fontsize=8)
            if line == 0:
                ax.set_title(f"eps {value:g}", fontsize=10)
    handles = [Line2D([], [], color=c, marker=m, lw=0, ms=6, label=group) for group, (c, m) in shown.items()]
    columns = max(2, min(len(handles), int(width // 2.4)))
    fig.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    seeds, images = len(report["settings"]["seeds"]), report.get("images", "?")
    fig.suptitle(
        f"Strength against cost: {report.get('teacher', 'the teacher')}\n{images} images, {seeds} seed{'s' * (seeds > 1)}; numbers: "
        "visits of carry; equal counts of gradients are drawn side by side",
        fontsize=10,
    )
    return save(fig, path)


def _panel(ax: Axes, rows: list[dict[str, Any]], gain: str, cost: str) -> dict[str, tuple[str, str]]:
    shown: dict[str, tuple[str, str]] = {}
    groups: dict[str, list[tuple[float, float, float, str]]] = {}
    for row in rows:
        group, _, visit = row["name"].partition(", visit ")
        x = row[cost] if isinstance(row[cost], (int, float)) else row[cost]["mean"]
        groups.setdefault(group, []).append((x, row[gain]["mean"], row[gain]["spread"] or 0.0, visit))
    for group, points in groups.items():
        label = PGD if group.startswith(f"{PGD}-") else group
        colour, marker = shown[group] = STYLES.get(label, OWN)
        xs, ys, bars, visits = zip(*points, strict=True)
        places = [x * SHIFT.get(group, 1.0) for x in xs] if cost == "gradient_evals" else list(xs)
        line = 0.9 if len(xs) > 1 else 0
        ax.errorbar(places, ys, bars, color=colour, marker=marker, ms=5, lw=line, elinewidth=1)
        for x, y, visit in zip(places, ys, visits, strict=True):
            if len(visits) > 1 and visit in (visits[0], visits[-1]):
                left = cost == "gradient_evals" and SHIFT.get(group, 1.0) < 1
                offset = (-10, -3) if left else (6, -3)
                ax.annotate(
                    visit, (x, y), textcoords="offset points", xytext=offset, fontsize=7, color=colour
                )
    # Gains in class loss span decades, those of maps do not.
    if gain == "class_loss_gain" and all(row[gain]["mean"] > 0 for row in rows):
        ax.set_yscale("log")
        _plain_numbers(ax.yaxis)
    else:
        ax.axhline(0, color="#BBBBBB", lw=0.8, zorder=0)
    ax.set_xscale("log")
    _plain_numbers(ax.xaxis)
    if cost == "gradient_evals":
        ax.set_xticks([1, 2, 5, 10, 20])
        ax.set_xlim(0.6, 28)
    ax.grid(alpha=0.25)
    ax.tick_params(labelsize=7, which="both")
    ax.margins(y=0.12)
    return shown


def _plain_numbers(axis: Any) -> None:
    """1, 2, 5, 10, ...: a log axis of less than two decades has too few labels of its own."""
    axis.set_major_formatter(lambda value, place: f"{value:g}")
    axis.set_minor_formatter(lambda value, place: f"{value:g}" if f"{value:e}"[0] in "25" else "")
