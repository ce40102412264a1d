"""All radii and seeds of a report, kept part by part, so that an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ikd_fast.files import write_json

from .measure import attacked_rows, clean_rows, work
from .plan import StrengthSettings, candidates
from .rows import StrengthRow
from .subject import Subject
from .summary import summarise

Parts = dict[str, list[StrengthRow]]


def measure_strength(
    subject: Subject,
    settings: StrengthSettings,
    *,
    parts: Path | None = None,
    advance: Callable[[float], None] = lambda done: None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The whole report as plain values: ``settings``, ``rows`` (means over seeds), ``runs`` (each eps and seed).

    Args:
        subject: the net, its images and its metric.
        settings: which radii, seeds and visits.
        parts: folder of finished (eps, seed) pairs: those that are there are not measured again. It must be of this net, these
            images and these settings; a name that hashes them is a good one.
        advance: called with the work done since the last call, of :func:`total_work` in all.
        note: called with what is measured next.
    """
    done: Parts = {}

    def part(name: str, title: str, amount: float, make: Callable[[], list[StrengthRow]]) -> None:
        path = None if parts is None else parts / f"{name}.json"
        if path is not None and path.is_file():
            done[name] = [StrengthRow(**row) for row in json.loads(path.read_text())]
            advance(amount)
            return
        note(title)
        done[name] = make()
        if path is not None:
            write_json(path, [row.to_dict() for row in done[name]])

    batches = subject.batches_count
    part("clean", "clean images", 2.0 * batches, lambda: clean_rows(subject, settings, advance))
    # Largest radius and first seed first: an interrupted report then has the rows that are asked for most.
    for seed in settings.seeds:
        for eps in sorted(settings.eps, reverse=True):
            part(
                part_name(eps, seed),
                f"eps {eps:g}, seed {seed}",
                batches * sum(map(work, candidates(settings, eps))),
                lambda eps=eps, seed=seed: attacked_rows(
                    subject, settings, eps=eps, seed=seed, advance=advance
                ),  # type: ignore[misc]
            )
    runs = [
        {"eps": eps, "seed": seed, "rows": [row.to_dict() for row in done[part_name(eps, seed)]]}
        for eps in settings.eps
        for seed in settings.seeds
    ]
    clean = [row.to_dict() for row in done["clean"]]
    return {
        "settings": settings.to_dict(),
        "clean": clean,
        "rows": summarise(clean, runs),
        "runs": runs,
    }


def total_work(settings: StrengthSettings, batches: int) -> float:
    """What the calls of ``advance`` add up to."""
    each = sum(work(candidate) for eps in settings.eps for candidate in candidates(settings, eps))
    return batches * (2.0 + len(settings.seeds) * each)


def part_name(eps: float, seed: int) -> str:
    return f"eps{eps:g}-seed{seed}"
