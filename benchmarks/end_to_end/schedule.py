"""Appendix B of the paper for a measured model: hours of a whole training, with images attacked beforehand or in the step."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .modes import PLAIN

# Hours on 8 GPUs, RetinaNet with FGD on COCO. In all, the appendix says, 6 hours more, "1/6 of the vanilla training": 6 of 24 is 1/4.
PAPER = {"baseline": 24.0, "generation": 3.0, "training": 27.0}


@dataclass(frozen=True)
class Schedule:
    """A training run. ``active``: share of its steps with an adversarial branch (the paper: 16 of 24 epochs).

    >>> round(Schedule().visits, 1)
    24.8
    """

    steps: int = 400
    batch: int = 8
    images: int = 86
    active: float = 0.667

    @property
    def visits(self) -> float:
        """How often an image is met while the branch is on."""
        return self.active * self.steps * self.batch / self.images


def rows(
    schedule: Schedule, modes: Mapping[str, Mapping[str, Any]], generation: Sequence[float] | None
) -> list[dict[str, Any]]:
    """``{"row", "seconds", "of_baseline", "paper_hours", "paper_of_baseline"}`` of each line; ``modes`` as in the result file.

    Reading the data counts. ``generation``: seconds an image of the offline pass; None: those lines are left out.
    """

    def step(name: str) -> float:
        mode = modes[name]
        return statistics.median(a + b for a, b in zip(mode["seconds"], mode["parts"]["data"], strict=True))

    def training(mean_step: float) -> float:
        return schedule.steps * (schedule.active * mean_step + (1 - schedule.active) * step(PLAIN))

    visits = schedule.visits
    first = 1 / visits
    baseline = schedule.steps * step(PLAIN)
    lines: list[tuple[str, float, float | None]] = [("baseline: FGD", baseline, PAPER["baseline"])]
    stored = training(step("offline images"))
    if generation is not None:
        pass_ = schedule.images * statistics.median(generation)
        lines += [
            (
                f"adversarial images beforehand ({schedule.images} images, 5 steps)",
                pass_,
                PAPER["generation"],
            ),
            ("training with them", stored, PAPER["training"]),
            ("both", pass_ + stored, PAPER["generation"] + PAPER["training"]),
        ]
    carried = first * step("carry, first visit") + (1 - first) * step("carry")
    lines.append(("`carry`, nothing beforehand", training(carried), None))
    updates = min(4.0, visits - 1)
    reused = (
        step("carry, first visit")
        + updates * step("carry")
        + (visits - 1 - updates) * step("carry, reused visit")
    ) / visits
    lines.append(("`carry`, `refresh=5`, nothing beforehand", training(reused), None))
    lines.append(("`single` in the step", training(step("single")), None))
    lines.append(("`iterative` in the step", training(step("iterative")), None))
    return [
        {
            "row": name,
            "seconds": seconds,
            "of_baseline": seconds / baseline,
            "paper_hours": paper,
            "paper_of_baseline": None if paper is None else paper / PAPER["baseline"],
        }
        for name, seconds, paper in lines
    ]
