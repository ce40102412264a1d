"""The teacher as the attack sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ikd_fast.attack import AttackBatch

from .teacher import FrozenTeacher


class StepVictim:
    """Features and class loss of the teacher on images in the student's units, for the sizes of one batch."""

    def __init__(
        self, teacher: FrozenTeacher, source: Any, victim: Any, sizes: Sequence[tuple[int, int]]
    ) -> None:
        self.teacher, self.source, self.victim, self.sizes = teacher, source, victim, sizes

    def features(self, images: Tensor) -> list[Tensor]:
        """The pyramid at ``source``, with the graph to ``images``; a victim's own where it has one."""
        if hasattr(self.victim, "features"):
            return list(self.victim.features(self._converted(images)))
        return self.teacher.watch(images, [self.source], self.sizes)[0]

    def cls_loss(self, images: Tensor, targets: Any) -> Tensor:
        """The victim's classification loss, ``[N]`` or a scalar."""
        loss = getattr(self.victim, "cls_loss", self.victim)
        return loss(self._converted(images), targets)

    def keyed_cls_loss(self, batch: AttackBatch) -> Tensor:
        """As :meth:`cls_loss`, with what keys the draws of a victim that asks for it."""
        keyed = getattr(self.victim, "keyed_cls_loss", None)
        if keyed is None:
            return self.cls_loss(batch.images, batch.targets)
        return keyed(
            replace(
                batch,
                images=self._converted(batch.images),
                make_clean=lambda: self._converted(batch.clean),
            )
        )

    def _converted(self, images: Tensor) -> Tensor:
        convert = self.teacher.convert
        return images if convert is None else convert(images, self.sizes)
