"""Mean and interval over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Mean and its two-sided 95 % interval by Student's t with n - 1 degrees of freedom."""

    mean: float
    low: float
    high: float


def spread(points: Sequence[float]) -> Spread:
    """mean +- t(0.975, n - 1) s / sqrt(n); one point has no interval and gives itself.

    >>> [round(v, 4) for v in spread([1.0, 2.0, 3.0])]
    [2.0, -0.4841, 4.4841]
    """
    mean = statistics.fmean(points)
    if len(points) < 2:
        return Spread(mean, mean, mean)
    from scipy.stats import t

    half = float(t.ppf(0.975, len(points) - 1)) * statistics.stdev(points) / math.sqrt(len(points))
    return Spread(mean, mean - half, mean + half)
