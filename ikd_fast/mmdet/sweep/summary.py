"""What a sweep found: one schema for scripts, one table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ikd_fast.intervals import spread

from .grid import Setting

SHOWN = {"bbox_mAP": "AP", "bbox_mAP_50": "AP50", "segm_mAP": "mask AP", "segm_mAP_50": "mask AP50"}
"""CocoMetric's names to ours. Of any other evaluator every metric is shown."""

Runs = Mapping[Setting, Mapping[int, Mapping[str, Any]]]
"""Results by setting and seed; a run that was not reached is missing."""


def summarise(runs: Runs, seeds: Sequence[int], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a sweep.

    Returns:
        ``facts``; ``seeds``; ``metrics``: names shown; ``failed``; ``settings``: one row each with ``runs`` (a result a seed),
        ``scores`` (by metric: points in the order of the seeds that finished, mean, 95 % interval over them, and the same for the
        difference from the baseline seed by seed), ``seconds_per_step`` and ``balance`` (means over seeds; by term its
        ``gradshare`` and ``share`` of the loss in the calibrated steps).
    """
    names = metric_names(runs)
    base = {seed: row for s, by in runs.items() if s.mode is None for seed, row in by.items() if _done(row)}
    settings = []
    for setting, by_seed in runs.items():
        done = {seed: row for seed, row in by_seed.items() if _done(row)}
        scores = {}
        for name, key in names.items():
            points = {seed: _metric(row, key) for seed, row in done.items()}
            scores[name] = _spread(list(points.values()))
            if setting.mode is not None:
                gaps = [points[seed] - _metric(base[seed], key) for seed in points if seed in base]
                scores[name]["over_baseline"] = _spread(gaps)
        settings.append(
            {
                "name": setting.name,
                "title": setting.title,
                "mode": setting.mode,
                "eps": None if setting.mode is None else setting.eps,
                "beta": None if setting.mode is None else setting.beta,
                "runs": {str(seed): dict(row) for seed, row in by_seed.items()},
                "scores": scores,
                "seconds_per_step": _mean([row["seconds_per_step"] for row in done.values()]),
                "balance": _mean_balance([row["balance"] for row in done.values()]),
            }
        )
    failed = sum(not _done(row) for by in runs.values() for row in by.values())
    return {**facts, "seeds": list(seeds), "metrics": list(names), "failed": failed, "settings": settings}


def metric_names(runs: Runs) -> dict[str, str]:
    """Ours to the evaluator's, in the order they are shown. A net that finds nothing leaves CocoMetric silent: AP 0."""
    keys = list(
        dict.fromkeys(
            key for by in runs.values() for row in by.values() if _done(row) for key in row["metrics"]
        )
    )
    coco = {SHOWN[key.rpartition("/")[2]]: key for key in keys if key.rpartition("/")[2] in SHOWN}
    found = coco or {key: key for key in keys}
    return found or {"AP": "coco/bbox_mAP", "AP50": "coco/bbox_mAP_50"}


def render(summary: Mapping[str, Any]) -> str:
    """Markdown: metrics in percent where they are AP, mean [95 % interval] and each seed."""
    metrics = summary["metrics"]
    head = ["setting"]
    for name in metrics:
        head += [f"{name}: mean [95 %]", f"{name} over baseline", f"{name} by seed"]
    head += ["s a step", "adv: of the loss", "adv: of the gradient norms"]
    lines = [_row(head), _row(["---"] * len(head))]
    for row in summary["settings"]:
        cells = [row["title"]]
        for name in metrics:
            score = row["scores"][name]
            cells += [_cell(score), _cell(score.get("over_baseline"), sign="+"), _points(score)]
        adv = row["balance"].get("kd/adv", {})
        seconds = row["seconds_per_step"]
        cells.append("-" if seconds is None else f"{seconds:.3g}")
        cells += [f"{100 * adv[k]:.2g} %" if k in adv else "-" for k in ("share", "gradshare")]
        lines.append(_row(cells))
    text = "\n".join(lines)
    for row in summary["settings"]:
        for seed, result in row["runs"].items():
            if not _done(result):
                text += f"\n\nfailed: {row['title']}, seed {seed}: {result['message']}"
    return text


def _done(row: Mapping[str, Any]) -> bool:
    return row["status"] == "done"


def _metric(row: Mapping[str, Any], key: str) -> float:
    return float(row["metrics"].get(key, 0.0))


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _mean_balance(rows: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    names = dict.fromkeys(name for row in rows for name in row)
    found: dict[str, dict[str, float]] = {}
    for name in names:
        kinds = dict.fromkeys(kind for row in rows for kind in row.get(name, {}))
        found[name] = {
            kind: sum(values) / len(values)
            for kind in kinds
            if (values := [row[name][kind] for row in rows if kind in row.get(name, {})])
        }
    return found


def _spread(points: Sequence[float]) -> dict[str, Any]:
    if not points:
        return {"points": [], "mean": None, "interval95": None}
    s = spread(points)
    return {
        "points": list(points),
        "mean": s.mean,
        "interval95": [s.low, s.high] if len(points) > 1 else None,
    }


def _cell(score: Mapping[str, Any] | None, sign: str = "") -> str:
    if score is None or score["mean"] is None:
        return "-"
    text = f"{100 * score['mean']:{sign}.1f}"
    if score["interval95"] is not None:
        low, high = score["interval95"]
        text += f" [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"
    return text


def _points(score: Mapping[str, Any]) -> str:
    return ", ".join(f"{100 * v:.1f}" for v in score["points"]) or "-"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
