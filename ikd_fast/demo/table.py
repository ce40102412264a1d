"""The tables that a run prints."""

from __future__ import annotations

from typing import Any

from ikd_fast.demo.plan import TITLES
from ikd_fast.demo.seeds import spread
from ikd_fast.demo.summary import METRICS, Scores, gather
from rich.table import Table


def result_table(results: dict[str, Any], *, steps: int, images: dict[str, int], title: str) -> Table:
    """One row a model: AP in per cent on validation and, where there is one, on the test split."""
    table = Table(title=title, title_justify="left", caption=_caption(steps, images), caption_justify="left")
    table.add_column("")
    for metric in METRICS:
        table.add_column(f"val {metric}", justify="right")
    if "test" in images:
        for metric in ("AP", "AP50"):
            table.add_column(f"test {metric}", justify="right")
    table.add_column("s / step", justify="right")
    for name, row in results.items():
        cells = [_percent(row["val"], metric) for metric in METRICS]
        if "test" in images:
            cells += [_percent(row["test"], metric) for metric in ("AP", "AP50")]
        seconds = row.get("seconds_per_step")
        table.add_row(TITLES[name], *cells, f"{seconds:.2f}" if seconds else "")
        if name == "teacher":
            table.add_section()
    return table


def seeds_table(results: dict[int, dict[str, Any]], *, steps: int, images: dict[str, int]) -> Table:
    """Mean, 95 % interval and every seed's point of validation AP and AP50, and the paired differences."""
    count = len(results)
    table = Table(title=f"Validation, {count} seeds", title_justify="left", caption=_caption(steps, images), caption_justify="left")
    for column in ("", "metric", "mean", "95 % interval", "each seed"):
        table.add_column(column, justify="left" if column in ("", "metric") else "right")
    points = gather(results)
    rows = [(TITLES[name], by) for name, by in points.items()]
    for better, base in (("fgd", "alone"), ("fgd_ikd", "fgd")):
        if better in points and base in points:
            pairs = {m: [a - b for a, b in zip(p, points[base][m], strict=True)] for m, p in points[better].items()}
            rows.append((f"{TITLES[better]} minus {TITLES[base]}", pairs))
    for title, by in rows:
        for metric in ("AP", "AP50"):
            s = spread(by[metric])
            each = "  ".join(f"{100 * p:.1f}" for p in by[metric])
            table.add_row(title if metric == "AP" else "", metric, f"{100 * s.mean:.1f}", f"{100 * s.low:.1f} .. {100 * s.high:.1f}", each)
    return table


def _percent(scores: Scores, metric: str) -> str:
    value = scores[metric]
    return "-" if value is None else f"{100 * value:.1f}"


def _caption(steps: int, images: dict[str, int]) -> str:
    sets = ", ".join(f"{count} {name} images" for name, count in images.items() if name != "train")
    return (
        f"COCO box AP in per cent after {steps} steps a student; {sets}. AP50: at IoU 0.5; AP_S, AP_M, AP_L: boxes below "
        "32x32, up to 96x96 and above, - where there is none. No order of the rows is promised at this length."
    )
