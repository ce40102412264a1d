"""A detector teacher as the attack sees it: its classification loss on given images and boxes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ikd_fast.distill import FrozenTeacher

from .samples import from_targets


class MMDetVictim:
    """``(images, targets) -> class loss`` of an mmdet detector, summed over its terms.

    One-stage: sum over levels of ``loss_cls``. Two-stage: the RoI class losses; the RPN's are left out as in the published code
    unless ``include_rpn``. The value couples images only through a positive normaliser, which does not change a sign step.
    """

    def __init__(self, teacher: FrozenTeacher, *, include_rpn: bool = False) -> None:
        self.teacher = teacher
        self.include_rpn = include_rpn

    def __call__(self, images: Tensor, targets: list[dict[str, Any]]) -> Tensor:
        detector: Any = self.teacher.net
        samples = from_targets(targets, (images.shape[-2], images.shape[-1]))
        return class_loss(detector.loss(images, samples), include_rpn=self.include_rpn)


def class_loss(losses: Mapping[str, Any], *, include_rpn: bool = False) -> Tensor:
    """Sum of the entries whose key names a classification loss."""
    total: Any = 0
    for key, value in losses.items():
        if "loss" not in key or "cls" not in key or ("rpn" in key and not include_rpn):
            continue
        total = total + (sum(v.sum() for v in value) if isinstance(value, (list, tuple)) else value.sum())
    if not isinstance(total, Tensor):
        raise ValueError(
            f"the teacher gives no classification loss to attack: its losses are {sorted(losses)}; use objective='feature'"
        )
    return total
