"""The teacher as the attack sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ikd_fast.attack import AttackBatch
from ikd_fast.attack.rows import take

from .taps import FeatureTap
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
            found = self.victim.features(self._converted(images))
            return [found] if isinstance(found, Tensor) else list(found)
        return self.maps(images)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The pyramid at ``source``: what is distilled, whatever a victim's own features are."""
        return self.teacher.watch(images, [self.source], self.sizes)[0]

    @property
    def distils_features(self) -> bool:
        """Whether :meth:`features` are the maps that are distilled."""
        return not hasattr(self.victim, "features")

    def cls_loss(self, images: Tensor, targets: Any) -> Tensor:
        """The victim's classification loss, ``[N]`` or a scalar."""
        loss = getattr(self.victim, "cls_loss", self.victim)
        return loss(self._converted(images), targets)

    @property
    def gradients_in_half(self) -> bool:
        """Whether the gradient passes through the teacher's float16, and so wants to be scaled."""
        return self.teacher.gradients_in_half

    def select(self, rows: Sequence[int]) -> StepVictim:
        """The same for some images of the batch."""
        return StepVictim(self.teacher, self.source, self.victim, take(self.sizes, rows))

    def maps_and_loss(self, batch: AttackBatch) -> tuple[list[Tensor], Tensor]:
        """Maps at ``source`` and class loss from one forward of the teacher, both with their graph.

        A victim with ``joint(batch, forward)`` runs ``forward()``, which gives the maps, and makes its loss of what the teacher
        computed there; of any other, the teacher's forward inside its loss is watched.
        """
        images = self._converted(batch.images)
        if hasattr(self.victim, "joint"):
            converted = replace(batch, images=images, make_clean=lambda: self._converted(batch.clean))
            return self.victim.joint(
                converted, lambda: self.teacher.watch(batch.images, [self.source], self.sizes)[0]
            )
        require_shared_forward(self.victim, self.source)
        loss = getattr(self.victim, "cls_loss", self.victim)
        found: list[Tensor] = []
        # With an engine the loss has to ask the teacher, not its net.
        try:
            with FeatureTap(self.teacher.running, self.source, grid=self.teacher.grid).capture() as maps:
                found.append(loss(images, batch.targets))
        except RuntimeError as error:
            if not found:
                raise
            raise _not_shared(str(error)) from error
        if any(len(m) != len(images) for m in maps):
            raise _not_shared(f"it ran maps of {[len(m) for m in maps]} images, the batch has {len(images)}")
        return self.teacher.outputs(maps), found[0]

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


def require_shared_forward(victim: Any, source: Any) -> None:
    """Raise where no forward of ``victim`` can be watched for the maps at ``source``."""
    if callable(source) and not hasattr(victim, "joint"):
        raise _not_shared(
            f"features is the callable {getattr(source, '__name__', source)!r}, which would be a forward of its own"
        )


def _not_shared(reason: str) -> ValueError:
    return ValueError(
        "mode='carry' with objective='cls' takes features and class loss from one forward of the teacher, but the victim's loss does "
        f"not give both: {reason}. Write features= as a module path that the loss's forward passes once for the batch (with an "
        "engine, the loss asks the FrozenTeacher and not its net), or a victim with joint(batch, forward) -> (maps, loss), or "
        "objective='feature', or fresh=True or mode='single', which make a forward of their own"
    )
