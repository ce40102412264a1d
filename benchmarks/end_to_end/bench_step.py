"""One training step of a student under a teacher: FGD alone, and with IKD on top, attacks of one and of five gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.comparison import TIMED, label
from ikd_fast import IKD, AdaptiveFreqAug, FGDLoss, OnlineDIFGSM

from .nets import Detector, class_loss

pytestmark = pytest.mark.benchmark(**TIMED)

N, SIZE = 2, (256, 320)
ATTACKS = {"FGD": None, "FGD + IKD, single": "single", "FGD + IKD, iterative": "iterative"}


@functools.cache
def build(side: str) -> IKD:
    torch.manual_seed(0)
    student, teacher = Detector(width=16, depth=1), Detector(width=24, depth=2).eval()
    mode = ATTACKS[side]
    attack = None if mode is None else OnlineDIFGSM(mode, value_range=(0, 1))
    return IKD(
        student,
        teacher,
        features=lambda net, images: net.features(images),
        losses=[FGDLoss(preset="retinanet")],
        task_loss=task_loss,
        attack=attack,
        victim=lambda images, targets: class_loss(teacher(images), targets),
        augment=None if mode is None else AdaptiveFreqAug(value_range=(0, 1)),
        pad_divisor=32,
    )


def task_loss(student: Detector, images: Tensor, targets: list[dict]) -> tuple[Tensor, list[Tensor]]:
    maps = student.features(images)
    return class_loss(student.logits(maps), targets).mean(), maps


@functools.cache
def batch() -> tuple[list[Tensor], list[dict]]:
    g = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *SIZE, generator=g) for _ in range(N)]
    box = torch.tensor([[20.0, 30.0, 200.0, 180.0], [10.0, 10.0, 30.0, 34.0]])
    return images, [{"boxes": box, "labels": torch.tensor([i, 1])} for i in range(N)]


def step(ikd: IKD) -> dict[str, Tensor]:
    images, targets = batch()
    ikd.zero_grad(set_to_none=True)
    out = ikd.step(images, targets, image_ids=list(range(N)), epoch=0)
    out.total.backward()
    return out.terms


class CountFlops(TorchDispatchMode):
    """Floating point operations of convolutions and matrix products; ``FlopCounterMode`` does not survive an attack's
    ``autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def check(side: str) -> None:
    """The terms that the side must have, finite, and a gradient for every parameter of the student."""
    ikd = build(side)
    terms = step(ikd)
    expected = {"task/task", "kd/fgd"} | ({"kd/adv"} if ATTACKS[side] else set())
    assert set(terms) == expected
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in ikd.student.parameters())


@pytest.mark.parametrize("side", ATTACKS)
def test_step(benchmark, side: str) -> None:
    check(side)
    ikd = build(side)
    with CountFlops() as flops:
        step(ikd)
    group = f"training step, forward and backward, {N} images {SIZE[0]}x{SIZE[1]}, small detectors, CPU"
    label(benchmark, group, side, peer=side == "FGD", gigaflop=round(flops.total / 1e9, 2))
    benchmark(step, ikd)
