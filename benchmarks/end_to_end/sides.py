"""What every pair of nets offers to the measurement, and the two pieces that several pairs share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from benchmarks.baselines.fgd_published import published_form
from ikd_fast import IKD, DistillContext, FGDLoss, OnlineDIFGSM
from ikd_fast.attack import AttackOutput, OfflineImages

from .modes import Mode
from .prediction import Nets, Visited
from .timeline import Timeline, charged_backward


class Side(Protocol):
    """A student under one mode, ready to train."""

    ikd: Any
    """The :class:`~ikd_fast.IKD` of the step; None for the student alone."""

    def load(self, epoch: int) -> Any:
        """Read a batch, the same for every side."""

    def step(self, batch: Any, epoch: int) -> Mapping[str, Tensor]:
        """One training step, the optimizer's included; the terms of the loss."""


class Pair(Protocol):
    """A student and a teacher. ``images``: of a batch; ``title``: what they are, for the head of a table."""

    name: str
    title: str
    images: int

    def side(self, mode: Mode, timeline: Timeline) -> Side:
        """A student of its own in ``mode``, its parts charged to ``timeline``."""

    def nets(self) -> Nets:
        """For counting pieces, on a batch as the sides see it."""


class PublishedFGD(FGDLoss):
    """FGD with the same parameters, level by level and box by box."""

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], ctx: DistillContext) -> Tensor:
        return published_form(self, [m.float() for m in student], [m.float() for m in teacher], ctx)


class StoredImages(OfflineImages):
    """Adversarial images that were made before, put into ``given`` before each step."""

    given: Tensor | None = None

    def __call__(
        self, victim: Any, images: Tensor, *_: Any, with_maps: bool = False, **__: Any
    ) -> AttackOutput:
        return super().__call__(victim, images, self.given, with_maps=with_maps)


class WatchedAttack:
    """An attack whose calls are charged to the part ``attack``, and whose last output is kept."""

    def __init__(self, attack: OnlineDIFGSM, timeline: Timeline) -> None:
        self.attack, self.timeline = attack, timeline
        self.images = 0
        self.last: AttackOutput | None = None

    def __call__(self, victim: Any, images: Tensor, *args: Any, **kwargs: Any) -> AttackOutput:
        with self.timeline.within("attack"):
            self.images = len(images)
            self.last = self.attack(victim, images, *args, **kwargs)
        return self.last

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attack, name)

    @property
    def visited(self) -> Visited:
        """What the last call met."""
        out = self.last
        if out is None:
            raise RuntimeError("the attack was not called yet")
        attacked = len(out.images)
        cold = None if out.memory_hits is None else 1 - out.memory_hits / max(attacked, 1)
        return Visited(attacked / self.images, cold, float(out.gradient_evals))


def kd_loss(mode: Mode, **arguments: Any) -> FGDLoss:
    return (PublishedFGD if mode.kd == "published" else FGDLoss)(preset="retinanet", **arguments)


def watch(ikd: IKD, timeline: Timeline) -> None:
    """Charge the parts of every later ``ikd.run``; its results stay bit for bit what they were.

    The teacher's forward through :class:`~ikd_fast.FrozenTeacher` is ``teacher`` wherever it happens: in mode ``carry`` that is the
    one of the adversarial images, which gives the distillation its maps and the attack its gradient.
    """
    ikd.run = timeline.wrapped("losses", ikd.run)  # type: ignore[method-assign]
    ikd.task_loss = timeline.wrapped("student", ikd.task_loss)
    ikd.call = timeline.wrapped("student", ikd.call)
    ikd.teacher.watch = timeline.wrapped("teacher", ikd.teacher.watch)  # type: ignore[method-assign]
    losses: list[Any] = [*ikd.losses, *([ikd.adv_loss] if ikd.adversarial else [])]
    for loss in losses:
        loss.forward = charged_backward(timeline, loss, loss.forward)
    if ikd.attack is not None:
        ikd.attack = WatchedAttack(ikd.attack, timeline)  # type: ignore[assignment]
