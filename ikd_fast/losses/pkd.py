"""Pearson knowledge distillation (PKD)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from ikd_fast.kernels.ops.pearson import pearson
from ikd_fast.kernels.reference.precision import full, no_autocast

from .base import DistillContext, KDLoss
from .checks import check_number
from .presets import resolve
from .registry import register_loss

DEFAULTS = {"weight": 6.0, "levels": None}
MATCHES = ("student", "teacher", None)


@register_loss
class PKDLoss(KDLoss):
    """Each channel's map must correlate with the teacher's, whatever its mean and scale.

    ``L = weight * mean over c of sum over n, h, w of (Z_S - Z_T)^2 / (2 M)`` for every level, ``Z_X = (X - mean) /
    (std + 1e-6)`` with mean and unbiased standard deviation of each channel over the ``M = N H W`` elements of the
    batch on this device. That is ``weight (M - 1) / M (1 - r)``, r being Pearson's correlation, averaged over
    channels: divided by N, C, H, W, between 0 and 2 ``weight``. Shifting or scaling a channel of either side changes
    nothing, so there is no align layer, and both sides must have equal channels. Cao et al., "PKD: General
    distillation framework for object detectors via Pearson correlation coefficient", NeurIPS 2022.

    A constant channel has Z = 0, and where the student's std is below 1e-3 its gradient is divided by 1e-3 instead
    (see ``ikd_fast.kernels.pearson``): finite, while the published one reaches 1e6. A level of one position and
    image gives 0.

    Args:
        preset: ``"retinanet"``, ``"reppoints"`` or ``"faster_rcnn"`` sets the published numbers; arguments given
            beside it win.
        weight: factor of every level, default 6.
        match: where height or width differ, the side that is resized to the other's (bilinear, corners not
            aligned): ``"student"``, as published, ``"teacher"``, or None, then it is an error. ``IKD`` and
            ``IKDDistiller`` compare strides before the loss does: write their ``match="resize"`` there.
        levels, source, name, backend: see ``KDLoss``.

    Shape: maps ``[N, C, H, W]`` of fp16, bf16, fp32 (statistics in fp32, never copied unless resized) or fp64.
    Returns ``{"0": scalar, ...}``.

    >>> import torch
    >>> t = torch.rand(2, 4, 8, 8)
    >>> ctx = DistillContext([], None, [(64, 64)] * 2, (64, 64), [0, 1])
    >>> bool(PKDLoss()([5 * t - 3], [t], ctx)["0"] < 1e-5)
    True
    >>> round(PKDLoss(weight=1.0)([-t], [t], ctx)["0"].item(), 4)  # r = -1, M = 128: 2 * 127 / 128
    1.9844
    """

    default_name = "pkd"
    normaliser = "mean over N, C, H, W"
    reads_boxes = False

    def __init__(
        self,
        preset: str | None = None,
        weight: float | None = None,
        match: str | None = "student",
        *,
        levels: Sequence[int] | None = None,
        source: str | Sequence[str] | None = None,
        name: str | None = None,
        backend: str = "auto",
    ) -> None:
        values = resolve("PKDLoss", preset, {"weight": weight, "levels": levels}, DEFAULTS)
        super().__init__(levels=values["levels"], source=source, name=name, backend=backend)
        self.weight = check_number("PKDLoss", "weight", values["weight"])
        if match not in MATCHES:
            raise ValueError(f"PKDLoss: match must be one of {', '.join(map(repr, MATCHES))}, got {match!r}")
        self.match = match

    def check_bind(self, channels: Mapping[int, tuple[int, int]]) -> None:
        for level, (s, t) in channels.items():
            if s != t:
                raise ValueError(
                    f"PKDLoss, level {level}: expected equal channels, got student {s} and teacher {t}; it compares channel "
                    "by channel and has no align layer: write a source= whose maps have equal channels, or take a loss "
                    "that aligns, such as CWDLoss"
                )

    def _check_channels(
        self, level: int, s: int, t: int, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> None:
        self.check_bind({level: (s, t)})
        super()._check_channels(level, s, t, student, teacher)

    def raw_pairs(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """As the base class has it, one side of unequal levels resized first."""
        student, teacher = list(student), list(teacher)
        for level in self.selected(min(len(student), len(teacher))) if self.match else ():
            s, t = student[level], teacher[level]
            if all(x.ndim == 4 and x.is_floating_point() and x.numel() for x in (s, t)):
                size_s, size_t = tuple(s.shape[2:]), tuple(t.shape[2:])
                if size_s != size_t and self.match == "student":
                    student[level] = _resized(s, size_t)
                elif size_s != size_t:
                    teacher[level] = _resized(t, size_s)
        return super().raw_pairs(student, teacher)

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], ctx: DistillContext
    ) -> dict[str, Tensor]:
        levels, s, t = zip(*self.raw_pairs(student, teacher), strict=True)
        values = pearson(s, t, backend=self.backend) * self.weight
        return {str(level): value for level, value in zip(levels, values.unbind(), strict=True)}

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, match={self.match!r}, {super().extra_repr()}"


def _resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """In float32: rounding to half precision would come before the statistics."""
    with no_autocast(x):
        return F.interpolate(full(x), size=size, mode="bilinear", align_corners=False)
