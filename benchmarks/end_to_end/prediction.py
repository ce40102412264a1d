"""What a step must cost in multiply-adds, from the nets alone: the formulas of the attack modes over counted pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .flops import gmac_of
from .modes import Mode


@dataclass(frozen=True)
class Pieces:
    """10^9 multiply-adds of one batch, each piece run by itself.

    Attributes:
        teacher: F, backbone and pyramid of the teacher, forward.
        head: H, what its class loss runs beyond that, forward.
        teacher_input: D, gradient of the pyramid to the images alone.
        head_input: gradient of the class loss to the pyramid, about H; less where a branch of the head has no part in it.
        task: the student with its own losses, forward and backward to its weights.
        features: the student's pyramid, forward and backward: its adversarial branch.
        distill: the KD losses themselves, forward and backward.
    """

    teacher: float
    head: float
    teacher_input: float
    head_input: float
    task: float
    features: float
    distill: float

    @property
    def plain(self) -> float:
        """A step of plain FGD."""
        return self.task + self.teacher + self.distill

    def asdict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Nets:
    """What the pieces are counted on: callables of a pair's nets, and one batch."""

    images: Tensor
    teacher_features: Callable[[Tensor], Sequence[Tensor]]
    teacher_class_loss: Callable[[Tensor], Tensor]
    task_loss: Callable[[Tensor], tuple[Tensor, Sequence[Tensor]]]
    student_features: Callable[[Tensor], Sequence[Tensor]]
    distill: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def count_pieces(nets: Nets) -> Pieces:
    """Run each piece alone and count it."""
    images = nets.images.detach()
    made: dict[str, Any] = {}

    @torch.no_grad()
    def teacher() -> None:
        made["maps"] = [m.detach() for m in nets.teacher_features(images)]

    @torch.no_grad()
    def teacher_with_head() -> None:
        nets.teacher_class_loss(images)

    def gradient(value: Callable[[Tensor], Tensor]) -> float:
        x = images.clone().requires_grad_(True)
        with torch.enable_grad():
            total = value(x).sum()
        return gmac_of(lambda: torch.autograd.grad(total, x))

    def task() -> None:
        loss, maps = nets.task_loss(images)
        made["student"] = [m.detach().requires_grad_(True) for m in maps]
        loss.backward()

    def features() -> None:
        _summed(nets.student_features(images)).backward()

    def distill() -> None:
        nets.distill(made["student"], made["maps"]).backward()

    f = gmac_of(teacher)
    with_head = gmac_of(teacher_with_head)
    through_all = gradient(nets.teacher_class_loss)
    through_maps = gradient(lambda x: _summed(nets.teacher_features(x)))
    return Pieces(
        f, with_head - f, through_maps, through_all - through_maps, gmac_of(task), gmac_of(features), gmac_of(distill)
    )  # fmt: skip


def _summed(maps: Sequence[Tensor]) -> Tensor:
    return torch.stack([m.sum() for m in maps]).sum()


@dataclass(frozen=True)
class Visited:
    """What an attack met in one step.

    Attributes:
        share: of the batch's images that had an adversarial branch (``fraction`` draws them by key, so it varies).
        cold: of those, the share that the memory had nothing of; without a memory None.
        gradients: of the teacher, an image of the branch.
    """

    share: float
    cold: float | None
    gradients: float


def predict(mode: Mode, p: Pieces, visited: Visited | None = None) -> float:
    """10^9 multiply-adds of one step in ``mode``; ``visited``: what its attack met, default: what the mode's name says."""
    if mode.kd is None:
        return p.task
    if not mode.adversarial:
        return p.plain
    update = p.teacher_input + (0.0 if mode.feature else p.head + p.head_input)
    own = p.teacher + update  # a gradient from a forward of its own
    extra = {
        "offline": 0.0,
        "single": own,
        "iterative": mode.steps * own,
        "carry": update,
        "fresh": own,
        "first": own,
        "reused": 0.0,
    }[mode.kind]
    share = mode.fraction
    if visited is not None:
        share = visited.share
        if mode.kind == "carry" and visited.cold is not None:
            extra = (1 - visited.cold) * update + visited.cold * own
    return p.plain + share * (p.teacher + p.features + extra)
