"""What the attack maximises. An objective returns one value per image, or a scalar summed over independent images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .batch import AttackBatch

Objective = Callable[[Any, AttackBatch], Tensor]


@runtime_checkable
class Victim(Protocol):
    """A frozen net under attack. Both methods keep the graph from ``images`` to what they return.

    A victim whose loss draws at random (an R-CNN samples its boxes) also has ``keyed_cls_loss(batch)``, which goes before
    ``cls_loss``: an :class:`AttackBatch` says which image, epoch and step a draw is for.
    """

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """Pyramid ``[N, C_i, H_i, W_i]``."""

    def cls_loss(self, images: Tensor, targets: Any) -> Tensor:
        """Classification loss, ``[N]`` or a scalar summed over the images."""


def cls_objective(victim: Any, batch: AttackBatch) -> Tensor:
    """The paper's: the teacher's classification loss on ground truth moved with the image.

    ``victim.keyed_cls_loss(batch)`` where there is one, else ``victim.cls_loss(images, targets)``, else
    ``victim(images, targets)``.
    """
    keyed = getattr(victim, "keyed_cls_loss", None)
    if keyed is not None:
        return keyed(batch)
    loss = getattr(victim, "cls_loss", victim)
    return loss(batch.images, batch.targets)


def feature_objective(victim: Any, batch: AttackBatch) -> Tensor:
    """Relative squared distance of the feature maps from the clean ones, mean over levels, ``[N]``.

    sum_i ||F_i(x + delta) - F_i(x)||^2 / ||F_i(x)||^2 / K. No labels and no head; the gradient is exactly zero at
    delta = 0, so the attack starts from a random delta.
    """
    with torch.no_grad():
        clean = _features(victim, batch.clean)
    moved = _features(victim, batch.images)
    terms = [
        (f - c).float().square().flatten(1).sum(1) / c.float().square().flatten(1).sum(1).clamp_min(1e-12)
        for f, c in zip(moved, clean, strict=True)
    ]
    return torch.stack(terms).mean(0)


def _features(victim: Any, images: Tensor) -> list[Tensor]:
    features = getattr(victim, "features", victim)(images)
    return [features] if isinstance(features, Tensor) else list(features)


class CustomObjective:
    """Wraps a user's ``(features, batch) -> [N] or scalar``."""

    def __init__(self, fn: Callable[[Sequence[Tensor], AttackBatch], Tensor]) -> None:
        self.fn = fn

    def __call__(self, victim: Any, batch: AttackBatch) -> Tensor:
        return self.fn(_features(victim, batch.images), batch)


OBJECTIVES: dict[str, Objective] = {"cls": cls_objective, "feature": feature_objective}


def resolve_objective(objective: str | Callable) -> Objective:
    """By name, or a callable ``(features, batch) -> [N] or scalar``."""
    if callable(objective):
        return CustomObjective(objective)
    if objective not in OBJECTIVES:
        raise ValueError(
            f"objective must be one of {sorted(OBJECTIVES)} or a callable (features, batch) -> [N], got {objective!r}"
        )
    return OBJECTIVES[objective]
