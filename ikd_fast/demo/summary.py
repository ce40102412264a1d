"""``summary.json``: what a run reached, in one schema for scripts."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ikd_fast.demo.plan import Settings
from ikd_fast.files import write_json
from ikd_fast.intervals import Spread, spread

METRICS = ("AP", "AP50", "AP_S", "AP_M", "AP_L")
Scores = dict[str, float | None]


def versions(loader: str = "torch") -> dict[str, str]:
    """Versions of what decides a number: this package and the stack below it, DALI where it is the loader."""
    found = {"python": platform.python_version()}
    dali = ("nvidia-dali-cuda120", "nvidia-dali-cuda130") if loader == "dali" else ()
    stack = ("ikd_fast", "torch", "numpy", "mmdet", "mmengine", "mmcv", "mmcv-lite", "pycocotools")
    for name in (*stack, *dali):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def build(
    settings: Settings, steps: int, results: dict[int, dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """The summary of a run.

    Args:
        settings: of the run.
        steps: training steps of each student, as run.
        results: by seed and model name (``teacher`` and the students): ``{"val": scores, "test": scores | None,
            "seconds_per_step": float | None}``.
        seconds: wall time of this call.

    Returns:
        ``models`` (validation AP in 0..1 by model, null where no box has that size) and ``test`` are those of the first seed;
        with several seeds ``seeds`` has mean, 95 % interval and every point of each validation metric.
    """
    first = next(iter(results.values()))
    out: dict[str, Any] = {
        "models": {name: row["val"] for name, row in first.items()},
        "test": {name: row["test"] for name, row in first.items() if row.get("test")},
        "seconds_per_step": {
            name: row["seconds_per_step"] for name, row in first.items() if row.get("seconds_per_step")
        },
        "steps": steps,
        "seed": settings.seed,
        "quick": settings.quick,
        "loader": settings.loader,
        "data": settings.data,
        "wall_seconds": round(seconds, 1),
        "versions": versions(settings.loader),
    }
    if len(results) > 1:
        out["seeds"] = {
            "list": list(results),
            "models": {
                name: {metric: _spread_json(points) for metric, points in by_metric.items()}
                for name, by_metric in gather(results).items()
            },
        }
    return out


def gather(results: dict[int, dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Validation points by model and metric, in the order of the seeds; metrics that a seed lacks are left out."""
    names = next(iter(results.values()))
    rows = {name: {m: [seed[name]["val"][m] for seed in results.values()] for m in METRICS} for name in names}
    return {name: {m: p for m, p in by.items() if None not in p} for name, by in rows.items()}


def _spread_json(points: list[float]) -> dict[str, Any]:
    s: Spread = spread(points)
    return {"points": points, "mean": s.mean, "interval95": [s.low, s.high]}


def write(out: Path, summary: dict[str, Any]) -> Path:
    path = out / "summary.json"
    write_json(path, summary)
    return path
