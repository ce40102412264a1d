"""DI-FGSM, 5 steps of 2 grey levels within 8, beside torchattacks: the same victim, images and steps."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import torchattacks_difgsm
from benchmarks.comparison import TIMED, assert_same, label
from ikd_fast import OnlineDIFGSM

from .nets import Classifier

pytestmark = pytest.mark.benchmark(**TIMED)

SETTINGS = {"eps": 8.0, "step": 2.0, "steps": 5}
N, SIDE, PROB = 4, 256, 0.5


@functools.cache
def problem() -> tuple[Classifier, Tensor, Tensor]:
    torch.manual_seed(0)
    net = Classifier().eval().requires_grad_(False)
    return net, torch.rand(N, 3, SIDE, SIDE), torch.randint(10, (N,))


def build_ours(
    net: Classifier, *, eps: float, step: float, steps: int, prob: float
) -> Callable[[Tensor, Tensor], Tensor]:
    attack = OnlineDIFGSM(
        "iterative", eps=eps, step_size=step, steps=steps, diversity_prob=prob, value_range=(0, 1)
    )

    def victim(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(net(images), labels, reduction="none")

    ids = list(range(N))
    return lambda images, labels: attack(victim, images, labels, image_ids=ids, epoch=0).images


SIDES = {"OnlineDIFGSM": build_ours, "torchattacks DIFGSM": torchattacks_difgsm.build}


def check() -> None:
    """Without input diversity, whose draws differ, the sides make the same images; with it, both stay in the ball and harm."""
    net, images, labels = problem()
    plain = {name: build(net, **SETTINGS, prob=0.0)(images, labels) for name, build in SIDES.items()}
    # Where a gradient is all but zero, rounding decides its sign; such a pixel is up to two steps apart.
    assert_same(plain, atol=1e-6, share=0.999)
    clean = F.cross_entropy(net(images), labels)
    for name, build in SIDES.items():
        out = build(net, **SETTINGS, prob=PROB)(images, labels)
        assert (out - images).abs().max() <= SETTINGS["eps"] / 255 + 1e-6, name
        assert F.cross_entropy(net(out), labels) > clean, name


@pytest.mark.parametrize("side", SIDES)
def test_difgsm(benchmark, side: str) -> None:
    net, images, labels = problem()
    attack = SIDES[side](net, **SETTINGS, prob=PROB)
    if side == "torchattacks DIFGSM":
        check()
    is_ours = side == "OnlineDIFGSM"
    group = f"DI-FGSM, 5 steps, {N} images {SIDE}x{SIDE}, small classifier, CPU"
    label(
        benchmark, group, side, peer=not is_ours, targets={"torchattacks DIFGSM": 0.95} if is_ours else None
    )
    benchmark(attack, images, labels)
