"""Focal and global distillation (FGD)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ikd_fast.kernels.ops.fgd import FGDSums, fgd_relation, fgd_sums
from ikd_fast.kernels.reference.precision import no_autocast

from .align import apply_linear, apply_norm
from .base import DistillContext, KDLoss
from .checks import bind_from_arguments, check_boxes, check_number
from .presets import resolve
from .registry import register_loss

DEFAULTS = {"temperature": 0.5, "alpha": 1e-3, "beta": 5e-4, "gamma": 1e-3, "lambda_": 5e-6, "levels": None}
BOX_SCALES = ("published", "padded")


class ContextAdd(nn.Module):
    """``Linear C -> C/2, LayerNorm, ReLU, Linear C/2 -> C`` on a context vector ``[N, C]``.

    Equal to the published 1x1 convolutions on ``[N, C, 1, 1]``. The last layer starts at zero, so
    nothing is added at first.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, channels // 2)
        self.norm = nn.LayerNorm(channels // 2)
        self.expand = nn.Linear(channels // 2, channels)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, context: Tensor) -> Tensor:
        return apply_linear(self.expand, F.relu(apply_norm(self.norm, apply_linear(self.reduce, context))))


class FGDLevel(nn.Module):
    """The parameters of one level: a mask and a context branch for each side. Both sides are trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.student_mask = nn.Parameter(_mask_weight(channels))
        self.teacher_mask = nn.Parameter(_mask_weight(channels))
        self.student_context = ContextAdd(channels)
        self.teacher_context = ContextAdd(channels)


def _mask_weight(channels: int) -> Tensor:
    # Kaiming normal of a C -> 1 convolution, as published; its bias cancels in the softmax and is left out.
    return nn.init.normal_(torch.empty(channels), std=math.sqrt(2.0 / channels))


def _relation(parts: Sequence[FGDLevel], sums: FGDSums, square: Tensor, positions: Sequence[int]) -> Tensor:
    """sum (R_S(S) - R_T(T))^2 ``[L, N]``; the branches of levels of equal channels are computed together."""
    n, levels = square.shape[1], len(parts)
    groups: dict[int, list[int]] = {}
    for level, channels in enumerate(sums.channels):
        groups.setdefault(channels, []).append(level)
    if len(groups) == 1:
        vectors = sums.vectors.view(3, levels, n, sums.channels[0])
        return fgd_relation(square, vectors[2], _added(parts, vectors[:2]), _column(positions, square))
    rows: list[Tensor] = [square] * levels
    per_level = list(zip(sums.student_context, sums.teacher_context, sums.channel, strict=True))
    for members in groups.values():
        vectors = torch.stack(
            [x for side in zip(*(per_level[i] for i in members), strict=True) for x in side]
        )
        vectors = vectors.unflatten(0, (3, len(members)))
        add = _added([parts[i] for i in members], vectors[:2])
        column = _column([positions[i] for i in members], square)
        chosen = torch.stack([square[i] for i in members])  # an index list would be a sync
        relation = fgd_relation(chosen, vectors[2], add, column)
        for i, row in zip(members, relation.unbind(0), strict=True):
            rows[i] = row
    return torch.stack(rows)


def _added(parts: Sequence[FGDLevel], context: Tensor) -> Tensor:
    """a_S - a_T ``[L, N, C]`` of contexts ``[2, L, N, C]``: a few launches for all levels and both sides."""
    branches = [p.student_context for p in parts] + [p.teacher_context for p in parts]

    def stacked(layer: str, name: str) -> Tensor:
        return torch.stack([getattr(getattr(b, layer), name) for b in branches]).to(context.dtype)

    with no_autocast(context):
        x = torch.baddbmm(
            stacked("reduce", "bias")[:, None], context.flatten(0, 1), stacked("reduce", "weight").mT
        )
        x = F.layer_norm(x, x.shape[-1:], eps=branches[0].norm.eps)
        x = F.relu(torch.addcmul(stacked("norm", "bias")[:, None], x, stacked("norm", "weight")[:, None]))
        x = torch.baddbmm(stacked("expand", "bias")[:, None], x, stacked("expand", "weight").mT)
    student, teacher = x.unflatten(0, (2, len(parts))).unbind(0)
    return student - teacher


def _column(positions: Sequence[int], like: Tensor) -> Tensor:
    """H*W of every level ``[L, 1, 1]``, filled on the device."""
    return torch.stack([like.new_full((1, 1), count) for count in positions])


@register_loss
class FGDLoss(KDLoss):
    """Foreground and background attention-weighted errors, attention maps, and global relation.

    For every level ``L = alpha L_fg + beta L_bg + gamma L_mask + lambda_ L_rela``, D = S - T, N images:

    - ``L_fg = 1/N sum Mfg[n,h,w] St[n,h,w] Ct[n,c] D^2``, ``L_bg`` the same with Mbg. St, Ct: the teacher's
      spatial and channel attention, softmaxes of mean |T| / temperature, scaled to mean 1. Mfg: 1 / area of
      the smallest box over a cell. Mbg: 1 over the number of background cells.
    - ``L_mask = 1/N (sum |Cs - Ct| + sum |Ss - St|)``.
    - ``L_rela = 1/N sum (R_S(S) - R_T(T))^2``, R(X) = X + a(X): a context vector pooled with a learned
      softmax over positions and passed through Linear, LayerNorm, ReLU, Linear. The last layer starts at 0,
      so at first L_rela = sum D^2 / N.

    Sums over C, H, W: divided by N alone. Yang et al., "Focal and global knowledge distillation for
    detectors", CVPR 2022, and the published module (defaults: its class defaults; its RetinaNet config has
    gamma 5e-4: ``preset="retinanet"``).

    Args:
        preset: ``"retinanet"``, ``"reppoints"``, ``"faster_rcnn"``, ``"mask_rcnn"`` or ``"gfl"`` sets the published
            numbers; arguments given beside it win.
        temperature: of the attentions, > 0, default 0.5.
        alpha, beta, gamma, lambda_: weights, default 1e-3, 5e-4, 1e-3, 5e-6.
        channels, teacher_channels, num_levels: channel counts, an integer or one a level, to make the
            parameters at once; left out, ``bind`` makes them. ``teacher_channels`` defaults to ``channels``.
        box_scale: ``"published"`` places boxes by the image size before padding on the map of the padded
            input, which stretches them when an image is padded; ``"padded"`` places them by the padded size.
        levels, source, name, backend: see ``KDLoss``.

    Shape: maps ``[N, C, H, W]`` of fp16, bf16, fp32 (summed in fp32, never copied) or fp64, C >= 2. Returns ``{"0":
    scalar, ...}``.

    >>> import torch
    >>> loss = FGDLoss(preset="retinanet", channels=8, num_levels=1)
    >>> ctx = DistillContext(boxes=[torch.tensor([[8.0, 8.0, 40.0, 30.0]])], labels=None,
    ...                      image_sizes=[(64, 64)], input_size=(64, 64), image_ids=[1])
    >>> teacher = [torch.rand(1, 8, 8, 8)]
    >>> loss(teacher, teacher, ctx)["0"].item()
    0.0
    """

    default_name = "fgd"
    normaliser = "sums over C, H, W; divided by N"
    reads_boxes = True
    align_channels = True
    needs_bind = True

    def __init__(
        self,
        preset: str | None = None,
        temperature: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        lambda_: float | None = None,
        channels: int | Sequence[int] | None = None,
        teacher_channels: int | Sequence[int] | None = None,
        num_levels: int | None = None,
        *,
        box_scale: str = "published",
        levels: Sequence[int] | None = None,
        source: str | Sequence[str] | None = None,
        name: str | None = None,
        backend: str = "auto",
    ) -> None:
        given = {
            "temperature": temperature,
            "alpha": alpha,
            "beta": beta,
            "gamma": gamma,
            "lambda_": lambda_,
            "levels": levels,
        }
        values = resolve("FGDLoss", preset, given, DEFAULTS)
        super().__init__(levels=values["levels"], source=source, name=name, backend=backend)
        if box_scale not in BOX_SCALES:
            raise ValueError(f"unknown box_scale {box_scale!r}; valid: {', '.join(BOX_SCALES)}")
        self.box_scale = box_scale
        self.temperature = check_number("FGDLoss", "temperature", values["temperature"], above=0)
        self.alpha, self.beta, self.gamma, self.lambda_ = (
            check_number("FGDLoss", key, values[key]) for key in ("alpha", "beta", "gamma", "lambda_")
        )
        self.relation = nn.ModuleDict()
        bind_from_arguments(self, channels, teacher_channels, num_levels)

    def build(self, level: int, student: int, teacher: int) -> None:
        if teacher < 2:
            raise ValueError(
                f"FGDLoss, level {level}: the relation term needs >= 2 teacher channels, got {teacher}"
            )
        self.relation[str(level)] = FGDLevel(teacher)

    def terms(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], ctx: DistillContext
    ) -> dict[str, dict[str, Tensor]]:
        """The four terms before their weights: ``{"0": {"fg", "bg", "mask", "rela"}, ...}``."""
        levels, values = self._terms(student, teacher, ctx)
        return {
            str(level): dict(zip(("fg", "bg", "mask", "rela"), row.unbind(), strict=True))
            for level, row in zip(levels, values.unbind(1), strict=True)
        }

    def _terms(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], ctx: DistillContext
    ) -> tuple[tuple[int, ...], Tensor]:
        """The levels, and their terms ``[4, L]``."""
        levels, s, t = zip(*self.raw_pairs(student, teacher), strict=True)
        check_boxes(ctx, s[0])
        sizes = ctx.image_sizes if self.box_scale == "published" else [ctx.input_size] * len(ctx.boxes)
        parts = [cast(FGDLevel, self.relation[str(level)]) for level in levels]
        sums = fgd_sums(
            s,
            t,
            ctx.boxes,
            sizes,
            [p.student_mask for p in parts],
            [p.teacher_mask for p in parts],
            self.temperature,
            backend=self.backend,
        )
        foreground, background, attention, square = sums.terms.unbind(0)
        relation = _relation(parts, sums, square, [x.shape[2] * x.shape[3] for x in s])
        return levels, torch.stack([foreground, background, attention, relation]).mean(2)

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], ctx: DistillContext
    ) -> dict[str, Tensor]:
        levels, (fg, bg, mask, rela) = self._terms(student, teacher, ctx)
        total = self.alpha * fg + self.beta * bg + self.gamma * mask + self.lambda_ * rela
        return {str(level): value for level, value in zip(levels, total.unbind(0), strict=True)}

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, alpha={self.alpha:g}, beta={self.beta:g}, "
            f"gamma={self.gamma:g}, "
            f"lambda_={self.lambda_:g}, box_scale={self.box_scale!r}, {super().extra_repr()}"
        )
