"""What an attack hands to an objective, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttackBatch:
    """One view of the batch: the images the victim sees in this step, and everything moved with them.

    Attributes:
        images: ``[N, C, H, W]`` perturbed view, requires grad.
        clean: ``[N, C, H, W]`` the same view of the unperturbed images, no grad; made when it is first asked for.
        targets: the targets with boxes moved by the same input diversity.
        sizes: (h, w) of each image before padding.
        step: index of the gradient step, 0-based.
        image_ids, epoch, seed: with ``step`` the key of whatever the victim draws at random; one 64-bit id an image.
        clean_maps: the victim's maps of the unperturbed images where somebody has them already.
    """

    images: Tensor
    targets: Any
    sizes: Sequence[tuple[int, int]]
    step: int
    make_clean: Callable[[], Tensor] = field(repr=False)
    image_ids: Sequence[int] = ()
    epoch: int = 0
    seed: int = 0
    clean_maps: Sequence[Tensor] | None = None

    @cached_property
    def clean(self) -> Tensor:
        with torch.no_grad():
            return self.make_clean()


@dataclass(frozen=True)
class AttackOutput:
    """Result of :class:`~ikd_fast.attack.OnlineDIFGSM`.

    Attributes:
        images: ``[M, C, H, W]`` adversarial images, units and dtype of the input, no grad; M < N under ``fraction``.
        delta: ``images - clean``.
        objective: per gradient step, the objective before the step: ``[M]`` or a scalar (detached).
        gradient_evals: gradients of the victim spent per image of the output: 0 where ``carry`` only reuses; more than the
            steps where float16 made one overflow; a mean where images differ.
        nonfinite: ``[M]`` bool: images whose gradient was not finite in some step; that step left them as they were.
        rows: which images of the input these are (``fraction``); None: all, in order.
        maps: the victim's feature maps of ``images``, without graph, where they were asked for.
        memory_hits: how many images found a perturbation in the memory (``carry``); None in other modes.
    """

    images: Tensor
    delta: Tensor
    objective: list[Tensor] = field(default_factory=list)
    gradient_evals: float = 0
    nonfinite: Tensor | None = None
    rows: list[int] | None = None
    maps: list[Tensor] | None = None
    memory_hits: int | None = None
