"""The data of one distillation step: what goes in, what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ikd_fast.attack.memory import View
from ikd_fast.attack.rows import take
from ikd_fast.augment import AugPlan
from ikd_fast.losses import DistillContext


@dataclass(frozen=True)
class StepBatch:
    """A batch ready for the nets.

    Attributes:
        clean: ``[N, C, H, W]`` x_data: geometry and noise applied (task loss and KD losses).
        geo: ``[N, C, H, W]`` x_geo: geometry only, what the adversarial delta is added to. The same tensor as ``clean`` where
            there is no noise.
        targets: one dict an image (``boxes`` xyxy pixels, ``labels``), or what the task takes, e.g. class indices.
        sizes: (h, w) before padding.
        image_ids: 64-bit keys.
        active: whether the augmentation and the adversarial branch are on in this step.
        plan: what the augmentation did, if anything.
        task_targets: what ``task_loss`` gets; ``targets`` unless given.
        views: where in its canonical image each image of ``geo`` lies, for an attack that keeps perturbations; None: it is the
            canonical image.
        adversarial: ``[N, C, H, W]`` adversarial images of ``geo`` that were made before, for :class:`~ikd_fast.attack.OfflineImages`.
    """

    clean: Tensor
    geo: Tensor
    targets: Any
    sizes: list[tuple[int, int]]
    image_ids: list[int]
    epoch: int
    step: int
    active: bool = True
    plan: AugPlan | None = None
    task_targets: Any = None
    views: list[View] | None = None
    adversarial: Tensor | None = None

    def context(self, seed: int, rows: Sequence[int] | None = None) -> DistillContext:
        """For the losses: boxes on the images' device, an empty list of boxes where targets have none. ``rows``: of these images."""
        dicts = self.targets if isinstance(self.targets, (list, tuple)) else []
        boxes, labels = [], []
        rows = range(len(self.sizes)) if rows is None else rows
        for i in rows:
            target = dicts[i] if i < len(dicts) and isinstance(dicts[i], dict) else {}
            found = torch.as_tensor(target.get("boxes", torch.zeros(0, 4))).reshape(-1, 4)
            boxes.append(found.to(self.clean.device, torch.float32, non_blocking=True))
            names = torch.as_tensor(target.get("labels", torch.zeros(len(found), dtype=torch.long)))
            labels.append(names.to(self.clean.device, non_blocking=True))
        return DistillContext(
            boxes=boxes,
            labels=labels,
            image_sizes=take(self.sizes, rows),
            input_size=(self.clean.shape[-2], self.clean.shape[-1]),
            image_ids=take(self.image_ids, rows),
            epoch=self.epoch,
            step=self.step,
            seed=seed,
        )


@dataclass(frozen=True)
class StepOutput:
    """Result of :meth:`ikd_fast.IKD.step`.

    Attributes:
        total: scalar to call ``backward()`` on: L_GT + L_T (weights inside the losses) + beta L_adv.
        terms: its addends, with graph: ``task/<name>``, ``kd/<loss>``, ``kd/adv``. They sum to ``total``.
        logs: detached scalars for any logger: ``kd/<loss>.<level>``, ``share/<term>``, ``gradshare/<term>``
            (first steps: :class:`~ikd_fast.distill.calibration.Calibration`), ``aug/crop_frac``, ``aug/noise_frac``,
            ``attack/linf`` (grey levels), ``attack/objective``, ``attack/gain`` (iterative: last over first objective),
            ``attack/gradients`` (of the teacher, an image), ``attack/memory_hit`` (carry: share of the images that had a
            perturbation), ``attack/images`` (fraction: how many were attacked). No key contains the word that trainers sum by.
        plan: the augmentation's plan.
    """

    total: Tensor
    terms: dict[str, Tensor]
    logs: dict[str, Tensor] = field(default_factory=dict)
    plan: AugPlan | None = None
