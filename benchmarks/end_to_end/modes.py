"""The training steps that are compared, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PLAIN = "FGD"
PUBLISHED = "FGD, published loops"
REFRESH, VISITS = 5, 16
MIX = f"carry, refresh {REFRESH} of {VISITS}"


@dataclass(frozen=True)
class Mode:
    """One kind of step.

    Attributes:
        name: in the tables.
        kd: ``"fgd"``, ``"published"`` (the same loss level by level and box by box), or None: the student alone.
        attack: arguments of :class:`~ikd_fast.OnlineDIFGSM`; None: no attack.
        kind: which formula of the attack's cost applies.
        offline: adversarial images come with the data; nothing is attacked.
        forget: the memory is emptied before every step, so that each visit is a first one.
    """

    name: str
    kd: str | None = "fgd"
    attack: Mapping[str, Any] | None = None
    kind: str = "none"
    offline: bool = False
    forget: bool = False
    steps: int = field(default=5, repr=False)

    @property
    def feature(self) -> bool:
        return (self.attack or {}).get("objective") == "feature"

    @property
    def fraction(self) -> float:
        return float((self.attack or {}).get("fraction", 1.0))

    @property
    def adversarial(self) -> bool:
        return self.attack is not None or self.offline


def _carry(name: str, kind: str = "carry", forget: bool = False, **arguments: Any) -> Mode:
    return Mode(name, attack={"mode": "carry", **arguments}, kind=kind, forget=forget)


MODES = {
    mode.name: mode
    for mode in (
        Mode("student alone", kd=None),
        Mode(PLAIN),
        Mode(PUBLISHED, kd="published"),
        Mode("offline images", kind="offline", offline=True),
        Mode("iterative", attack={"mode": "iterative"}, kind="iterative"),
        Mode("single", attack={"mode": "single"}, kind="single"),
        _carry("carry"),
        _carry("carry, feature objective", objective="feature"),
        _carry("carry, fresh", kind="fresh", fresh=True),
        _carry("carry, fraction 0.5", fraction=0.5),
        _carry("carry, first visit", kind="first", forget=True),
        _carry("carry, reused visit", kind="reused", refresh=1),
    )
}


def mixture(refresh: int = REFRESH, visits: int = VISITS) -> dict[str, float]:
    """Shares of an image's visits under ``refresh``: a first one, updates on the others up to ``refresh``, reuse.

    >>> mixture(5, 16)
    {'carry, first visit': 0.0625, 'carry': 0.25, 'carry, reused visit': 0.6875}
    """
    if not 1 <= refresh <= visits:
        raise ValueError(f"expected 1 <= refresh <= visits, got {refresh} and {visits}")
    return {
        "carry, first visit": 1 / visits,
        "carry": (refresh - 1) / visits,
        "carry, reused visit": (visits - refresh) / visits,
    }
