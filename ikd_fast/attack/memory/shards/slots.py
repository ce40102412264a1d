"""Slots that nothing refers to: kept by their size, taken by what fits."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable


class Spares:
    """Free extents of a shard, in units, of one process."""

    def __init__(self) -> None:
        self._by_size: list[tuple[int, int]] = []

    def give(self, unit: int, units: int) -> None:
        """Extent ``[unit, unit + units)`` is free."""
        if units:
            insort(self._by_size, (units, unit))

    def take(self, units: int) -> int | None:
        """First unit of an extent of so many, cut from the smallest that has them; None: there is none."""
        at = bisect_left(self._by_size, (units, -1))
        if at == len(self._by_size):
            return None
        size, unit = self._by_size.pop(at)
        self.give(unit + units, size - units)
        return unit

    def __len__(self) -> int:
        return len(self._by_size)

    @property
    def units(self) -> int:
        return sum(size for size, _ in self._by_size)


def gaps(
    used: Iterable[tuple[int, int]], first: int, end: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What lies free between slots.

    Args:
        used: (unit, units) of slots that are referred to.
        first, end: the units that there are.

    Returns:
        free extents (unit, units), and those of ``used`` that lie outside or overlap another.

    >>> gaps([(10, 2), (14, 1)], 8, 20)
    ([(8, 2), (12, 2), (15, 5)], [])
    """
    free, wrong, at = [], [], first
    for unit, units in sorted(used):
        if unit < at or unit + units > end or not units:
            wrong.append((unit, units))
            continue
        if unit > at:
            free.append((at, unit - at))
        at = unit + units
    if at < end:
        free.append((at, end - at))
    return free, wrong
