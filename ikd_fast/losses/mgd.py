"""Masked generative distillation (MGD)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ikd_fast.kernels.ops.masked_l2 import mask_maps
from ikd_fast.kernels.ops.pyramid_l2 import pyramid_l2

from .align import apply_conv
from .base import DistillContext, KDLoss
from .checks import bind_from_arguments, check_number
from .presets import resolve
from .registry import register_loss

DEFAULTS = {"alpha": 2e-5, "mask_ratio": 0.65, "levels": None}


def _one_dtype(maps: Sequence[Tensor]) -> list[Tensor]:
    """The maps as they are, or in their common dtype where an align convolution made some of them float32."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in maps))
    return [x.to(dtype) for x in maps]


@register_loss
class MGDLoss(KDLoss):
    """The student's masked map must generate the teacher's whole map.

    ``L = alpha / N * sum over n, c, h, w of (G(S * m) - T)^2`` for every level, with ``m[n, 1, h, w] = 0``
    where ``u > 1 - mask_ratio`` (u uniform in [0, 1)), else 1, and G = 3x3 convolution, ReLU, 3x3 convolution
    on the teacher's C channels, one G a level, framework's default initialisation. Not divided by C, H, W.
    Yang et al., "Masked generative distillation", ECCV 2022, and the published detection module (defaults:
    its one-stage values).

    The mask is a function of (``ctx.seed``, image id, ``ctx.epoch``, level): the same whatever the batch,
    device or a resume, and new in every epoch. The published module draws from the process's generator.

    Args:
        preset: ``"retinanet"``, ``"reppoints"``, ``"faster_rcnn"`` or ``"mask_rcnn"`` sets the published numbers;
            arguments given beside it win.
        alpha: weight of every level, default 2e-5.
        mask_ratio: fraction of positions set to zero, 0..1, default 0.65.
        channels, teacher_channels, num_levels: channel counts, an integer or one a level, to make the
            parameters at once; left out, ``bind`` makes them. ``teacher_channels`` defaults to ``channels``.
        levels, source, name, backend: see ``KDLoss``.

    Shape: maps ``[N, C, H, W]`` of fp16, bf16, fp32 (computed in fp32) or fp64. Returns ``{"0": scalar,
    ...}``.

    >>> import torch
    >>> loss = MGDLoss(preset="retinanet", channels=8, num_levels=1)
    >>> ctx = DistillContext([], None, [(64, 64)] * 2, (64, 64), image_ids=[11, 12], epoch=3)
    >>> value = loss([torch.rand(2, 8, 8, 8)], [torch.rand(2, 8, 8, 8)], ctx)
    >>> sorted(value), value["0"].requires_grad
    (['0'], True)
    """

    default_name = "mgd"
    normaliser = "sum over C, H, W; divided by N"
    reads_boxes = False
    align_channels = True
    needs_bind = True

    def __init__(
        self,
        preset: str | None = None,
        alpha: float | None = None,
        mask_ratio: float | None = None,
        channels: int | Sequence[int] | None = None,
        teacher_channels: int | Sequence[int] | None = None,
        num_levels: int | None = None,
        *,
        levels: Sequence[int] | None = None,
        source: str | Sequence[str] | None = None,
        name: str | None = None,
        backend: str = "auto",
    ) -> None:
        values = resolve(
            "MGDLoss", preset, {"alpha": alpha, "mask_ratio": mask_ratio, "levels": levels}, DEFAULTS
        )
        super().__init__(levels=values["levels"], source=source, name=name, backend=backend)
        self.alpha = check_number("MGDLoss", "alpha", values["alpha"])
        self.mask_ratio = check_number("MGDLoss", "mask_ratio", values["mask_ratio"])
        if not 0 <= self.mask_ratio <= 1:
            raise ValueError(
                f"MGDLoss: mask_ratio, the fraction set to zero, must be in 0..1, got {mask_ratio}"
            )
        self.generation = nn.ModuleDict()
        bind_from_arguments(self, channels, teacher_channels, num_levels)

    def build(self, level: int, student: int, teacher: int) -> None:
        self.generation[str(level)] = nn.Sequential(
            nn.Conv2d(teacher, teacher, 3, padding=1), nn.ReLU(), nn.Conv2d(teacher, teacher, 3, padding=1)
        )

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], ctx: DistillContext
    ) -> dict[str, Tensor]:
        levels, s, t = zip(*self.raw_pairs(student, teacher), strict=True)
        masked = mask_maps(
            _one_dtype(s),
            ctx.image_ids,
            ratio=self.mask_ratio,
            levels=levels,
            seed=ctx.seed,
            epoch=ctx.epoch,
            backend=self.backend,
        )
        made = [self._generate(level, x) for level, x in zip(levels, masked, strict=True)]
        values = pyramid_l2(made, _one_dtype(t), backend=self.backend).mean(1) * self.alpha
        return {str(level): value for level, value in zip(levels, values.unbind(), strict=True)}

    def _generate(self, level: int, masked: Tensor) -> Tensor:
        first, _, last = cast(nn.Sequential, self.generation[str(level)])
        return apply_conv(cast(nn.Conv2d, last), F.relu(apply_conv(cast(nn.Conv2d, first), masked)))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, mask_ratio={self.mask_ratio}, {super().extra_repr()}"
