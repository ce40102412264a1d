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


@runtime_checkable
class JointVictim(Victim, Protocol):
    """A victim whose features and class loss come from one forward, which ``carry`` needs when the step wants both."""

    def maps_and_loss(self, batch: AttackBatch) -> tuple[Sequence[Tensor], Tensor]:
        """Maps and class loss of ``batch.images``, both with their graph."""


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
    return relative_distance(features_of(victim, batch.images), _clean_features(victim, batch))


def relative_distance(moved: Sequence[Tensor], clean: Sequence[Tensor]) -> Tensor:
    """The value of :func:`feature_objective` from the two pyramids."""
    terms = [
        (f - c).float().square().flatten(1).sum(1) / c.float().square().flatten(1).sum(1).clamp_min(1e-12)
        for f, c in zip(moved, clean, strict=True)
    ]
    return torch.stack(terms).mean(0)


def _clean_features(victim: Any, batch: AttackBatch) -> Sequence[Tensor]:
    if batch.clean_maps is not None:
        return batch.clean_maps
    with torch.no_grad():
        return features_of(victim, batch.clean)


def features_of(victim: Any, images: Tensor) -> list[Tensor]:
    """The victim's maps as a list; a victim without ``features`` is a callable that gives them."""
    features = getattr(victim, "features", victim)(images)
    return [features] if isinstance(features, Tensor) else list(features)


def maps_of(victim: Any, images: Tensor) -> list[Tensor]:
    """The maps that are distilled, where those are not the victim's features."""
    return list(victim.maps(images)) if hasattr(victim, "maps") else features_of(victim, images)


def shares_forward(objective: Objective, victim: Any) -> bool:
    """Whether one forward can give the objective and the maps that are distilled."""
    return objective is cls_objective or getattr(victim, "distils_features", True)


class CustomObjective:
    """Wraps a user's ``(features, batch) -> [N] or scalar``."""

    def __init__(self, fn: Callable[[Sequence[Tensor], AttackBatch], Tensor]) -> None:
        self.fn = fn

    def __call__(self, victim: Any, batch: AttackBatch) -> Tensor:
        return self.fn(features_of(victim, batch.images), batch)


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


def value_and_maps(objective: Objective, victim: Any, batch: AttackBatch) -> tuple[Tensor, list[Tensor]]:
    """The objective and the maps of ``batch.images`` from one forward of the victim, both with their graph."""
    if objective is cls_objective:
        if not hasattr(victim, "maps_and_loss"):
            raise TypeError(
                "mode='carry' with objective='cls' takes maps and class loss from one forward: expected a victim with "
                f"maps_and_loss(batch) -> (maps, loss), got {type(victim).__name__}; write that method, or objective='feature'"
            )
        maps, value = victim.maps_and_loss(batch)
        return value, list(maps)
    maps = features_of(victim, batch.images)
    if isinstance(objective, CustomObjective):
        return objective.fn(maps, batch), maps
    return relative_distance(maps, _clean_features(victim, batch)), maps
