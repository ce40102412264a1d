"""Some of the images of a batch, and whatever belongs to them, without asking the device anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def take(value: Any, rows: Sequence[int]) -> Any:
    """Rows of a tensor or list; None stays None, and all rows in order are the value itself.

    >>> take(torch.tensor([5, 6, 7]), [2, 0]).tolist(), take("abc", [1]), take(None, [0])
    ([7, 5], ['b'], None)
    """
    if value is None or list(rows) == list(range(len(value))):
        return value
    if isinstance(value, Tensor):
        return torch.stack([value[i] for i in rows]) if len(rows) else value[:0]
    return [value[i] for i in rows]


def select(victim: Any, rows: Sequence[int]) -> Any:
    """A victim that was made for a batch, for some of its images; any other as it is."""
    return victim.select(rows) if hasattr(victim, "select") else victim


def interleave(n: int, parts: Sequence[tuple[Sequence[int], Sequence[Tensor]]]) -> list[Tensor]:
    """One pyramid of ``n`` images from the pyramids of disjoint rows that cover them.

    >>> a, b = torch.zeros(2, 1, 1, 1), torch.ones(1, 1, 1, 1)
    >>> interleave(3, [([0, 2], [a]), ([1], [b])])[0].flatten().tolist()
    [0.0, 1.0, 0.0]
    """
    parts = [(rows, maps) for rows, maps in parts if len(rows)]
    if len(parts) == 1:
        return list(parts[0][1])
    place = {i: (p, k) for p, (rows, _) in enumerate(parts) for k, i in enumerate(rows)}
    levels = len(parts[0][1])
    return [
        torch.stack([parts[place[i][0]][1][level][place[i][1]] for i in range(n)]) for level in range(levels)
    ]
