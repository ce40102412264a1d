"""Which rows a strength report has, and with which settings each attack is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ikd_fast.attack import OnlineDIFGSM

CONTROL, ITERATIVE, PGD = "random sign", "iterative", "PGD"
"""The rows that others are compared with: gains are over the first, percentages of the others'."""


@dataclass(frozen=True)
class StrengthSettings:
    """What a report measures.

    Args:
        eps: radii in grey levels.
        seeds: each draws starts, input diversity and views anew.
        visits: of ``carry``, that are measured.
        steps: of the PGD reference, each of eps / 4 (so that they can cross the ball both ways) from a random start.
        shrink, quality: of the published round trip: the share of the network's size at which an image is saved whose original has
            that same size, and the JPEG quality.
        memory: arguments of ``carry``'s :class:`~ikd_fast.attack.memory.PerturbationMemory`.
        options: further arguments of every mode's :class:`~ikd_fast.OnlineDIFGSM` that takes them, e.g. ``diversity_rate``.
        own: an attack to measure besides, as ``dict(mode="single", step_size=16)``; its eps and step are scaled to each eps.
    """

    eps: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    visits: tuple[int, ...] = (1, 2, 3, 4, 6)
    steps: int = 20
    shrink: float = 0.6
    quality: int = 95
    memory: Mapping[str, Any] = field(default_factory=lambda: {"bits": 4, "stride": 1})
    options: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, values in (("eps", self.eps), ("seeds", self.seeds), ("visits", self.visits)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must be one or more different numbers, got {list(values)}")
        if min(self.eps) <= 0 or max(self.eps) > 255:
            raise ValueError(f"eps are grey levels above 0 and up to 255, got {list(self.eps)}")
        if min(self.visits) < 1:
            raise ValueError(f"visits count from 1, got {list(self.visits)}")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds must be >= 0, got {list(self.seeds)}")
        if not 0 < self.shrink <= 1:
            raise ValueError(f"shrink must be above 0 and up to 1, got {self.shrink}")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "eps": list(self.eps), "seeds": list(self.seeds), "visits": list(self.visits), "steps": self.steps,
            "shrink": self.shrink, "quality": self.quality, "memory": dict(self.memory), "options": dict(self.options),
            "own": None if self.own is None else dict(self.own),
        }  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """One row to be measured.

    Attributes:
        name: unique within an eps.
        kind: ``"attack"``; ``"round_trip"``, of the attack that ``attack`` is; ``"carry"``, a row for each of ``visits``.
        attack: arguments of its :class:`~ikd_fast.OnlineDIFGSM`, but the seed.
        cost: gradients per image that its row takes to measure (for the time that is left).
        align: crops between the visits lie on multiples of it (``AdaptiveFreqAug(crop_align=...)``).
    """

    name: str
    kind: str
    attack: Mapping[str, Any]
    visits: tuple[int, ...] = ()
    cost: int = 1
    align: int = 1

    def build(self, seed: int, **more: Any) -> OnlineDIFGSM:
        return OnlineDIFGSM(**{**self.attack, "seed": seed, **more})

    def row_names(self) -> list[str]:
        """``carry 3`` and so on."""
        return [f"{self.name}, visit {n}" for n in self.visits] if self.kind == "carry" else [self.name]


def candidates(settings: StrengthSettings, eps: float) -> list[Candidate]:
    """All rows at one eps, in the order of the table."""
    options = dict(settings.options)
    common = {"eps": eps} | {
        k: v for k, v in options.items() if k in ("diversity_rate", "diversity_per_batch")
    }
    paper = {**common, "mode": "iterative", "steps": 5, "step_size": eps / 4, "diversity_prob": 0.5}
    found = [
        Candidate(CONTROL, "attack", {**common, "mode": "random_sign"}, cost=0),
        Candidate("single", "attack", {**common, "mode": "single"}),
        Candidate("single, feature", "attack", {**common, "mode": "single", "objective": "feature"}),
        Candidate(ITERATIVE, "attack", paper, cost=5),
        Candidate(f"{ITERATIVE}, published round trip", "round_trip", paper, cost=0),
    ]
    walk, seen = max(settings.visits) - 1, len(settings.visits)
    ways: tuple[tuple[str, dict[str, Any]], ...] = (
        ("carry", {}),
        ("carry, feature", {"objective": "feature"}),
        ("carry, fresh", {"fresh": True}),
    )
    for name, way in ways:
        kept = {**common, "mode": "carry", "memory": dict(settings.memory), **way}
        found.append(Candidate(name, "carry", kept, settings.visits, cost=walk + seen))
    aligned = {**common, "mode": "carry", "memory": dict(settings.memory)}
    found.append(
        Candidate("carry, crop_align 8", "carry", aligned, settings.visits, cost=walk + seen, align=8)
    )
    if settings.own is not None:
        found.append(_own(settings, settings.own, eps, walk + seen))
    pgd = {
        **common,
        "mode": "iterative",
        "steps": settings.steps,
        "step_size": eps / 4,
        "diversity_prob": 0,
        "random_start": True,
    }
    found.append(Candidate(f"{PGD}-{settings.steps}", "attack", pgd, cost=settings.steps))
    return found


def _own(settings: StrengthSettings, given: Mapping[str, Any], eps: float, walk: int) -> Candidate:
    """The config's own attack at another eps: its step, if it names one, is the same share of eps. Every image is attacked."""
    plain = OnlineDIFGSM(**{key: value for key, value in given.items() if key != "memory"})
    scaled = {**given, "eps": eps, "fraction": 1.0}
    if "step_size" in given:
        scaled["step_size"] = plain.step_size * eps / plain.eps if plain.eps else plain.step_size
    name = f"as configured ({plain.mode})"
    if plain.mode == "carry":
        scaled["memory"] = dict(settings.memory)
        return Candidate(name, "carry", scaled, settings.visits, cost=walk)
    return Candidate(name, "attack", scaled, cost=plain.steps)
