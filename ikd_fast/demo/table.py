"""The tables that a run prints."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ikd_fast.demo.loader import LOADERS
from ikd_fast.demo.plan import TITLES
from ikd_fast.demo.summary import METRICS, Scores, gather
from ikd_fast.intervals import spread


def result_table(
    results: dict[str, Any], *, steps: int, images: dict[str, int], title: str, loader: str = "torch"
) -> Table:
    """One row a model: AP in per cent on validation and, where there is one, on the test split."""
    sizes = [m for m in METRICS if any(row["val"][m] is not None for row in results.values())]
    columns = [("val", metric) for metric in sizes] + [
        ("test", m) for m in ("AP", "AP50") if "test" in images
    ]
    table = _table(title, steps, images, loader)
    table.add_column("", no_wrap=True)
    for split, metric in columns:
        table.add_column(f"{split}\n{metric}", justify="right", no_wrap=True)
    table.add_column("seconds\na step", justify="right", no_wrap=True)
    for name, row in results.items():
        cells = [_percent(row[split], metric) for split, metric in columns]
        seconds = row.get("seconds_per_step")
        table.add_row(TITLES[name], *cells, f"{seconds:.2f}" if seconds else "")
    return table


def seeds_table(
    results: dict[int, dict[str, Any]], *, steps: int, images: dict[str, int], loader: str = "torch"
) -> Table:
    """Mean, 95 % interval and every seed's point of validation AP and AP50, and the paired differences."""
    count = len(results)
    table = _table(f"Validation, {count} seeds", steps, images, loader)
    for column in ("", "metric", "mean", "95 % interval", "each seed"):
        table.add_column(
            column, justify="left" if column in ("", "metric") else "right", no_wrap=column != "each seed"
        )
    points = gather(results)
    rows = [(TITLES[name], by) for name, by in points.items()]
    for better, base in (("fgd", "alone"), ("fgd_ikd", "fgd")):
        if better in points and base in points:
            pairs = {
                m: [a - b for a, b in zip(p, points[base][m], strict=True)] for m, p in points[better].items()
            }
            # Short, so that every seed fits a terminal of 80 columns.
            title = f"{TITLES[better]} minus {TITLES[base]}".replace("student + ", "")
            rows.append((title, pairs))
    for title, by in rows:
        for metric in ("AP", "AP50"):
            s = spread(by[metric])
            each = "  ".join(f"{100 * p:.1f}" for p in by[metric])
            table.add_row(
                title if metric == "AP" else "",
                metric,
                f"{100 * s.mean:.1f}",
                f"{100 * s.low:.1f} .. {100 * s.high:.1f}",
                each,
            )
    return table


def _percent(scores: Scores, metric: str) -> str:
    value = scores[metric]
    return "-" if value is None else f"{100 * value:.1f}"


def _table(title: str, steps: int, images: dict[str, int], loader: str) -> Table:
    sets = ", ".join(f"{count} {name} images" for name, count in images.items() if name != "train")
    caption = (
        f"COCO box AP in per cent after {steps} steps a student, images through {LOADERS[loader]}, on {sets}. "
        "AP: mean over IoU 0.50 to 0.95; AP50: at IoU 0.50; AP_S, AP_M, AP_L: "
        "of boxes up to 32x32, up to 96x96 and above. No order of the rows is promised at this length."
    )
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
