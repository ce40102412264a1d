"""Means and spreads over seeds, gains over random signs, and percentages of the reference attacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .plan import CONTROL, ITERATIVE, PGD

Row = dict[str, Any]
GAINS = ("class_loss", "feature_change")
"""What a gain is of: an attack raises both."""


def summarise(clean: Sequence[Row], runs: Sequence[Row]) -> list[Row]:
    """One row for each attack and eps.

    Each seed's gain is its value minus that of the random-sign control of the same eps and seed; percentages are of the gain of
    ``iterative`` and of PGD at the same eps and seed. Means are over seeds, ``spread`` is the standard deviation over seeds
    (n - 1), None of one seed. A percentage is None where the reference gains nothing.
    """
    rows = [_row(row["name"], None, [row], [row]) for row in clean]
    for eps in dict.fromkeys(run["eps"] for run in runs):
        seeds = [{row["name"]: row for row in run["rows"]} for run in runs if run["eps"] == eps]
        for name in seeds[0]:
            if all(name in seed for seed in seeds):
                rows.append(
                    _row(name, eps, [seed[name] for seed in seeds], [seed[CONTROL] for seed in seeds], seeds)
                )
    return rows


def _row(name: str, eps: float | None, rows: Sequence[Row], controls: Sequence[Row], seeds: Any = ()) -> Row:
    out: Row = {"name": name, "eps": eps, "seeds": len(rows)}
    for key in ("class_loss", "feature_change", "mean_abs", "outside", "seconds"):
        out[key] = over_seeds([row[key] for row in rows])
    out["linf"] = max(row["linf"] for row in rows)
    out["gradient_evals"] = over_seeds([row["gradient_evals"] for row in rows])["mean"]
    out["metrics"] = {key: over_seeds([row["metrics"][key] for row in rows]) for key in rows[0]["metrics"]}
    out["levels"] = [
        {key: over_seeds([row["levels"][k][key] for row in rows]) for key in ("l2", "cosine")}
        for k in range(len(rows[0]["levels"]))
    ]
    if eps is None:
        return out
    pgd = next(other for other in seeds[0] if other.startswith(f"{PGD}-"))
    for key in GAINS:
        gains = [row[key] - control[key] for row, control in zip(rows, controls, strict=True)]
        out[f"{key}_gain"] = over_seeds(gains)
        for label, reference in (("iterative", ITERATIVE), ("pgd", pgd)):
            theirs = [seed[reference][key] - seed[CONTROL][key] for seed in seeds]
            shares = [100 * a / b if b > 0 else None for a, b in zip(gains, theirs, strict=True)]
            out[f"{key}_percent_of_{label}"] = over_seeds(shares)
    return out


def over_seeds(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation (n - 1).

    >>> over_seeds([1.0, 3.0]), over_seeds([2.0]), over_seeds([None, 1.0])
    ({'mean': 2.0, 'spread': 1.4142135623730951}, {'mean': 2.0, 'spread': None}, {'mean': None, 'spread': None})
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"mean": None, "spread": None}
    mean = sum(known) / len(known)
    if len(known) < 2:
        return {"mean": mean, "spread": None}
    return {"mean": mean, "spread": math.sqrt(sum((v - mean) ** 2 for v in known) / (len(known) - 1))}
