"""One weight for every level of a loss, or one a level."""

from __future__ import annotations

from collections.abc import Sequence

from .checks import check_number


def check_weights(owner: str, weight: float | Sequence[float]) -> float | tuple[float, ...]:
    """A finite number, or a sequence of them."""
    if isinstance(weight, list | tuple):
        if not weight:
            raise ValueError(f"{owner}: weight must be a number or one a level, got an empty sequence")
        return tuple(check_number(owner, f"weight[{i}]", w) for i, w in enumerate(weight))
    return check_number(owner, "weight", weight)


def weights_of(owner: str, weight: float | tuple[float, ...], levels: Sequence[int]) -> tuple[float, ...]:
    """The weight of each of the chosen levels."""
    if isinstance(weight, float):
        return (weight,) * len(levels)
    if len(weight) != len(levels):
        raise ValueError(
            f"{owner}: expected one weight for each of the {len(levels)} levels {list(levels)}, got "
            f"{len(weight)}: {list(weight)}; give one number for all, or choose levels="
        )
    return weight
