"""All sides in turn, round after round: what one round's noise does to a side it does to the others as well."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .flops import CountFlops
from .modes import MIX, MODES, Mode, mixture
from .prediction import Pieces, Visited, count_pieces, predict
from .sides import Pair, Side
from .timeline import PARTS, Timeline

WARM_UP, WARM_UP_FRACTION = 1, 8
FIRST_EPOCH = WARM_UP_FRACTION + 1
"""Of the first round. The one before it is counted."""


@dataclass
class Figures:
    """Of one mode: what one step was counted to take, and lists with an entry a round.

    Attributes:
        predicted_once, counted: 10^9 multiply-adds of the counted step, by the formulas and as it ran.
        counted_parts: the same, where in the step they ran.
        gradients: of the teacher, an image of the batch, per round.
        seconds: of a step, reading its data apart.
        parts: seconds of each part.
        predicted: 10^9 multiply-adds by the formulas; they differ between rounds where ``fraction`` draws other images.
    """

    name: str
    predicted_once: float
    counted: float
    counted_parts: dict[str, float]
    seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    predicted: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """q1, median, q3 of at least two values."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def measure(
    pair: Pair,
    modes: Sequence[Mode],
    rounds: int,
    *,
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Pieces, dict[str, Figures]]:
    """The pieces that predictions are made of, and each mode's figures in the order of ``modes``.

    The first steps of every side are not timed: they warm up, and one is counted. A round is one step of each side on the same
    images, starting with another side each time.
    """
    if rounds < 2:
        raise ValueError(f"expected 2 rounds or more, for quartiles, got {rounds}")
    pieces = count_pieces(pair.nets())
    timeline = Timeline(device)
    sides: dict[str, Side] = {}
    found: dict[str, Figures] = {}
    for mode in modes:
        side = pair.side(mode, timeline)
        # With a fraction, a few epochs pass before every image has had its first visit.
        for epoch in range(WARM_UP if mode.fraction == 1 else WARM_UP_FRACTION):
            step(side, timeline, epoch)
        found[mode.name] = counted(side, mode, timeline, pieces)
        sides[mode.name] = side
        say(f"{mode.name}: {found[mode.name].counted:.2f} GMAC a step")
    names = list(sides)
    for i in range(rounds):
        gc.collect()
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds, parts = step(sides[name], timeline, FIRST_EPOCH + i)
            figures, visited = found[name], seen(sides[name])
            figures.seconds.append(seconds)
            figures.predicted.append(predict(MODES[name], pieces, visited))
            figures.gradients.append(visited.gradients * visited.share if visited else 0.0)
            for part, spent in parts.items():
                figures.parts[part].append(spent)
        say(f"round {i + 1} of {rounds}")
    if mix := mixed(found):
        found[MIX] = mix
    return pieces, found


def step(side: Side, timeline: Timeline, epoch: int) -> tuple[float, dict[str, float]]:
    """Seconds of one step without reading its data, and of its parts."""
    timeline.clear()
    batch = side.load(epoch)
    _wait(timeline)
    start = time.perf_counter()
    side.step(batch, epoch)
    _wait(timeline)
    return time.perf_counter() - start, timeline.seconds()


def _wait(timeline: Timeline) -> None:
    if timeline.cuda:
        torch.cuda.synchronize()


def seen(side: Side) -> Visited | None:
    """What the side's attack met in its last step."""
    return side.ikd.attack.visited if side.ikd is not None and side.ikd.attack is not None else None


def counted(side: Side, mode: Mode, timeline: Timeline, pieces: Pieces) -> Figures:
    """Count one step as it runs, beside what the formulas say of it."""
    timeline.clear()
    batch = side.load(FIRST_EPOCH - 1)
    with CountFlops(lambda: timeline.part) as flops:
        side.step(batch, FIRST_EPOCH - 1)
    parts = {part: count / 2e9 for part, count in flops.parts.items()}
    return Figures(mode.name, predict(mode, pieces, seen(side)), flops.gmac, parts)


def mixed(found: dict[str, Figures]) -> Figures | None:
    """``carry`` with ``refresh``: first, updating and reused visits, measured apart and averaged over an image's visits."""
    shares = mixture()
    if not set(shares) <= set(found):
        return None
    sides = [found[name] for name in shares]

    def mean(values: Sequence[float]) -> float:
        return sum(share * value for share, value in zip(shares.values(), values, strict=True))

    def means(lists: Sequence[list[float]]) -> list[float]:
        return [mean(values) for values in zip(*lists, strict=True)]

    return Figures(
        MIX,
        mean([f.predicted_once for f in sides]),
        mean([f.counted for f in sides]),
        {part: mean([f.counted_parts.get(part, 0.0) for f in sides]) for part in PARTS},
        means([f.seconds for f in sides]),
        {part: means([f.parts[part] for f in sides]) for part in PARTS},
        means([f.predicted for f in sides]),
        means([f.gradients for f in sides]),
    )
