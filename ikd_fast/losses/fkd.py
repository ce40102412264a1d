"""Feature-based knowledge distillation with attention masks and non-local blocks (FKD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ikd_fast.kernels.ops.attention_stats import AttentionStats, attention_stats
from ikd_fast.kernels.ops.checks import savable
from ikd_fast.kernels.reference.precision import full, no_autocast

from .align import apply_conv, apply_linear
from .base import DistillContext, KDLoss
from .checks import bind_from_arguments, check_number
from .non_local import NonLocal
from .presets import resolve
from .registry import register_loss
from .roots import safe_sqrt

DEFAULTS = {
    "tau": 0.5,
    "alpha": 4.2e-4,
    "beta": 2.4e-2,
    "gamma": 4.2e-4,
    "channel_attention": True,
    "levels": None,
}
TERMS = ("feat", "chan", "spat", "nld")


class FKDLevel(nn.Module):
    """The parameters of one level: four adaptations of the student, a non-local block for each side. All are trained."""

    def __init__(self, channels: int, level: int) -> None:
        super().__init__()
        # Published at 256 channels: 64, 64, 128, ... inner channels, pools of 8, 4, 2, ...
        inner = max(channels // (4 if level < 2 else 2), 1)
        pool = {0: 8, 1: 4}.get(level, 2)
        self.feature = nn.Conv2d(channels, channels, 1)
        self.channel = nn.Linear(channels, channels)
        self.spatial = nn.Conv2d(1, 1, 3, padding=1)
        self.relation = nn.Conv2d(channels, channels, 1)
        self.student_non_local = NonLocal(channels, inner, pool)
        self.teacher_non_local = NonLocal(channels, inner, pool)


def _mask(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """``(A(S) + A(T)) / 2`` without a gradient; A: a softmax over what one image holds, of mean 1."""
    s, t = ((x.detach().flatten(1) / tau).softmax(1) for x in (student, teacher))
    return ((s + t) * (s.shape[1] / 2)).view(student.shape)


def _norm(difference: Tensor) -> Tensor:
    return safe_sqrt(difference.square().sum())


@register_loss
class FKDLoss(KDLoss):
    """Attention-guided and non-local distillation of features.

    For every level, with T and S ``[N, C, H, W]``, norms over the whole batch as one vector (no 1/N: they grow as
    sqrt N; not divided by C, H, W)::

        A_s(X)[n, h, w] = HW softmax_hw(mean_c |X| / tau),  A_c(X)[n, c] = C softmax_c(mean_hw |X| / tau)
        M_s = (A_s(T) + A_s(S)) / 2,  M_c = (A_c(T) + A_c(S)) / 2,  without a gradient
        feat = sqrt( sum (T - a(S))^2 M_s [M_c] )                    a: 1x1 convolution
        chan = || mean_hw T - f(mean_hw S) ||                        f: linear layer
        spat = || mean_c T - k(mean_c S) ||                          k: 3x3 convolution, 1 channel
        nld  = || r(NL_S(S)) - NL_T(T) ||                            r: 1x1 convolution, NL: ``NonLocal``
        L = alpha feat + beta (chan + spat) + gamma nld

    Zhang and Ma, "Improve object detection with feature-based knowledge distillation", ICLR 2021, in the form of
    its published code: chan and spat compare signed means, ``M_c`` counts for one-stage detectors alone. NL_T is
    trained with the loss, T is not. Inner channels of NL are C/4 at pyramid levels 0 and 1, else C/2; pools are 8, 4,
    2, 2, ..., at most a map's smaller side. Every norm is 0 with gradient 0 at 0.

    Args:
        preset: ``"retinanet"``, ``"reppoints"``, ``"faster_rcnn"`` or ``"mask_rcnn"`` sets the published numbers;
            arguments given beside it win.
        tau: temperature of the attentions, > 0; default 0.5.
        alpha, beta, gamma: weights of feat, of chan + spat, and of nld. Defaults: the published one-stage values
            4.2e-4, 2.4e-2, 4.2e-4 (two-stage: 7e-5, 4e-3, 7e-5).
        channel_attention: whether ``M_c`` counts; default True (two-stage: False).
        channels, teacher_channels, num_levels: channel counts, an integer or one a level, to make the
            parameters at once; left out, ``bind`` makes them. Where they differ, a biased 1x1 convolution brings S to
            T's first. ``teacher_channels`` defaults to ``channels``.
        levels, source, name, backend: see ``KDLoss``; ``levels`` also tells NL's sizes, which go by pyramid index.

    The blocks' batch normalisation uses the batch in training mode: N H W > 1 at every level, else a ``ValueError``.

    Shape: maps ``[N, C, H, W]`` of fp16, bf16, fp32 (computed in fp32) or fp64. Returns ``{"0": scalar, ...}``.

    >>> loss = FKDLoss(channels=8, num_levels=1)
    >>> ctx = DistillContext([], None, [(64, 64)] * 2, (64, 64), image_ids=[0, 1])
    >>> maps = [torch.rand(2, 8, 8, 8)]
    >>> sorted(loss(maps, maps, ctx)), sorted(loss.terms(maps, maps)["0"])
    (['0'], ['chan', 'feat', 'nld', 'spat'])
    """

    default_name = "fkd"
    normaliser = "norms over N, C, H, W; not divided"
    reads_boxes = False
    align_channels = True
    needs_bind = True

    def __init__(
        self,
        preset: str | None = None,
        tau: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        channel_attention: bool | None = None,
        channels: int | Sequence[int] | None = None,
        teacher_channels: int | Sequence[int] | None = None,
        num_levels: int | None = None,
        *,
        levels: Sequence[int] | None = None,
        source: str | Sequence[str] | None = None,
        name: str | None = None,
        backend: str = "auto",
    ) -> None:
        given = {
            "tau": tau,
            "alpha": alpha,
            "beta": beta,
            "gamma": gamma,
            "channel_attention": channel_attention,
            "levels": levels,
        }
        values = resolve("FKDLoss", preset, given, DEFAULTS)
        super().__init__(levels=values["levels"], source=source, name=name, backend=backend)
        self.tau = check_number("FKDLoss", "tau", values["tau"], above=0)
        self.alpha, self.beta, self.gamma = (
            check_number("FKDLoss", key, values[key]) for key in ("alpha", "beta", "gamma")
        )
        if not isinstance(values["channel_attention"], bool):
            raise TypeError(
                f"FKDLoss: channel_attention must be True or False, got {values['channel_attention']!r}"
            )
        self.channel_attention = values["channel_attention"]
        self.adaptation = nn.ModuleDict()
        bind_from_arguments(self, channels, teacher_channels, num_levels)

    def build(self, level: int, student: int, teacher: int) -> None:
        self.adaptation[str(level)] = FKDLevel(teacher, level)

    def terms(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> dict[str, dict[str, Tensor]]:
        """The four norms before their weights: ``{"0": {"feat", "chan", "spat", "nld"}, ...}``."""
        levels, s, t = zip(*self.raw_pairs(student, teacher), strict=True)
        t = tuple(savable(t))  # the teacher's non-local block is trained: autograd keeps its input
        stats = [attention_stats(side, backend=self.backend) for side in (s, t)]
        out = {}
        for i, level in enumerate(levels):
            means = [AttentionStats(*([kind[i]] for kind in side)) for side in stats]
            values = self._level(level, full(s[i]), full(t[i]), *means)
            out[str(level)] = dict(zip(TERMS, values, strict=True))
        return out

    def _level(
        self, level: int, s: Tensor, t: Tensor, student: AttentionStats, teacher: AttentionStats
    ) -> tuple[Tensor, ...]:
        part = cast(FKDLevel, self.adaptation[str(level)])
        if part.student_non_local.training and s.shape[0] * s.shape[2] * s.shape[3] < 2:
            raise ValueError(
                f"FKDLoss, level {level}: the batch normalisation of the non-local blocks needs N H W > 1, got maps "
                f"{tuple(s.shape)}; leave this level out with levels="
            )
        square = (t - apply_conv(part.feature, s)).square()
        by_channel = _mask(student.channel[0], teacher.channel[0], self.tau)
        if not self.channel_attention:
            by_channel = torch.ones_like(by_channel)
        with no_autocast(square):
            focus = (by_channel[:, None] @ square.flatten(2)).flatten(1)
        focus = focus * _mask(student.spatial[0], teacher.spatial[0], self.tau).flatten(1)
        channel = teacher.channel_mean[0] - apply_linear(part.channel, student.channel_mean[0])
        spatial = apply_conv(part.spatial, student.spatial_mean[0][:, None])[:, 0]
        relation = apply_conv(part.relation, part.student_non_local(s)) - part.teacher_non_local(t)
        return (
            safe_sqrt(focus.sum()),
            _norm(channel),
            _norm(teacher.spatial_mean[0] - spatial),
            _norm(relation),
        )

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], ctx: DistillContext
    ) -> dict[str, Tensor]:
        return {
            level: self.alpha * v["feat"] + self.beta * (v["chan"] + v["spat"]) + self.gamma * v["nld"]
            for level, v in self.terms(student, teacher).items()
        }

    def extra_repr(self) -> str:
        return (
            f"tau={self.tau}, alpha={self.alpha:g}, beta={self.beta:g}, gamma={self.gamma:g}, "
            f"channel_attention={self.channel_attention}, {super().extra_repr()}"
        )
