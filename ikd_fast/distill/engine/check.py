"""The engine against the net as it was given: relative error of every map, and which option is to blame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .options import TeacherEngine

Pyramids = Sequence[Sequence[Tensor]]


@dataclass(frozen=True)
class EngineCheck:
    """One self-check.

    Attributes:
        errors: per source, ||F' - F|| / ||F|| of each level; NaN where F' is not finite.
        bound: what they must not exceed.
    """

    sources: tuple[str, ...]
    errors: tuple[tuple[float, ...], ...]
    bound: float
    options: str

    @property
    def worst(self) -> float:
        """The largest; NaN if there is one.

        >>> EngineCheck(("neck",), ((1e-3, 2e-3),), 1e-2, "").worst
        0.002
        """
        values = [e for level in self.errors for e in level]
        return max(values, key=lambda e: (e != e, e), default=0.0)

    @property
    def passed(self) -> bool:
        return self.worst <= self.bound

    def __str__(self) -> str:
        rows = "; ".join(
            f"{source} {' '.join(f'{e:.1e}' for e in errors)}"
            for source, errors in zip(self.sources, self.errors, strict=True)
        )
        return f"teacher engine ({self.options}): relative error per level: {rows}; bound {self.bound:.1e}"


def relative_error(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth||; 0 where both are zero.

    >>> relative_error(torch.tensor([3.0, 4.1]), torch.tensor([3.0, 4.0])) <= 0.0201
    True
    """
    truth = truth.double()
    difference, norm = (found.double() - truth).norm(), truth.norm()
    value = float(difference / norm) if norm > 0 else float(difference)
    return value if value < float("inf") else float("nan")


def compare(found: Pyramids, truth: Pyramids) -> tuple[tuple[float, ...], ...]:
    """Per source and level."""
    return tuple(
        tuple(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))
        for ours, theirs in zip(found, truth, strict=True)
    )


def require(check: EngineCheck, options: TeacherEngine, errors_with: Callable[[TeacherEngine], Any]) -> None:
    """Raise for a failed check, naming the option without which it would pass.

    Args:
        errors_with: the errors under other options.
    """
    if check.passed:
        return
    culprits = []
    for name in ("dtype", "fold_bn", "compile", "cuda_graphs", "channels_last"):
        off: dict[str, Any] = {name: None if name == "dtype" else False}
        if getattr(options, name) in (None, False, torch.float32, "float32"):
            continue
        without = replace(check, errors=errors_with(replace(options, **off)))
        if without.passed:
            culprits.append(f"{name}={off[name]!r} (then {without.worst:.1e})")
    advice = (
        f"switch off {' or '.join(culprits)}"
        if culprits
        else "no single option is to blame: write engine=None"
    )
    raise ValueError(
        f"{check}: {check.worst:.1e} is above it; {advice}, or accept it with tolerance={2 * check.worst:.0e}"
        if check.worst == check.worst
        else f"{check}: the engine's maps are not finite where the net's are; {advice}"
    )
