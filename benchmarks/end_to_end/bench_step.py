"""One training step of a student under a teacher: FGD alone, and with IKD on top. The cheap rows; ``cost.py`` has all of them."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.comparison import TIMED, label

from .flops import CountFlops
from .measure import seen
from .modes import MODES, PLAIN, PUBLISHED
from .prediction import Pieces, count_pieces, predict
from .small import SmallPair, SmallSide
from .timeline import Timeline

pytestmark = pytest.mark.benchmark(**TIMED)

SIDES = [PLAIN, PUBLISHED, "offline images", "carry", "carry, feature objective", "single", "iterative"]


@functools.cache
def pair() -> SmallPair:
    return SmallPair()


@functools.cache
def pieces() -> Pieces:
    return count_pieces(pair().nets())


def check(side: SmallSide) -> None:
    """The terms that the side must have, finite, and a gradient for every parameter of the student; the memory is then warm."""
    terms = side.step(side.load(0), 0)
    expected = {"task/task", "kd/fgd"} | ({"kd/adv"} if side.mode.adversarial else set())
    assert set(terms) == expected
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in side.student.parameters())


@pytest.mark.parametrize("name", SIDES)
def test_step(benchmark, name: str) -> None:
    mode, timeline = MODES[name], Timeline()
    side = pair().side(mode, timeline)
    check(side)
    batch = side.load(1)
    with CountFlops() as flops:
        side.step(batch, 1)
    # The published form multiplies more in the loss itself, a thousandth of the step.
    predicted = predict(mode, pieces(), seen(side))
    assert flops.gmac == pytest.approx(predicted, rel=1e-2)
    notes = {"gmac": round(flops.gmac, 3), "gmac_of_fgd": round(predicted / pieces().plain, 3)}
    group = f"training step, forward, backward, optimizer, {pair().title}, CPU"
    label(benchmark, group, name, peer=name == PLAIN, **notes)

    def step() -> None:
        timeline.clear()
        side.step(batch, 2)

    benchmark(step)
