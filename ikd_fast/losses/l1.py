"""Absolute distance of features."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ikd_fast.kernels.ops.pyramid_l2 import pyramid_l1

from .base import DistillContext, KDLoss
from .checks import check_number
from .registry import register_loss

REDUCTIONS = {
    "mean": "mean over N, C, H, W",
    "batch": "sum over C, H, W; divided by N",
    "sum": "sum over N, C, H, W; not divided",
}


@register_loss
class L1Loss(KDLoss):
    """Absolute distance of the student's maps from the teacher's, level by level.

    With ``D = S - T``, the loss of a level is ``weight`` times

    =============  =======================  =======================
    reduction      value of a level         normaliser
    =============  =======================  =======================
    ``"mean"``     sum |D| / (N C H W)      elements; the default
    ``"batch"``    sum |D| / N              images
    ``"sum"``      sum |D|                  none
    =============  =======================  =======================

    The gradient at D = 0 is 0. Where channels differ, a biased 1x1 convolution brings S to T's (``bind``). The usual
    baseline of feature distillation, e.g. of structural distillation (de Rijk et al., NeurIPS 2022), which rescales
    the maps first. mmdet has a loss of this name for boxes; this one is ``ikd_fast.losses.L1Loss``.

    Args:
        weight: factor of every level.
        reduction: ``"mean"``, ``"batch"`` or ``"sum"``; write it in the config, as the three differ by orders.
        levels, source, name, backend: see ``KDLoss``.

    Shape: maps ``[N, C, H, W]`` of fp16, bf16, fp32 (summed in fp32, never copied) or fp64. Returns ``{"0":
    scalar, ...}``.

    >>> import torch
    >>> s, t = [torch.full((2, 4, 3, 3), -3.0)], [torch.zeros(2, 4, 3, 3)]
    >>> ctx = DistillContext([], None, [(24, 24)] * 2, (24, 24), [0, 1])
    >>> L1Loss()(s, t, ctx)["0"].item(), L1Loss(reduction="batch")(s, t, ctx)["0"].item()
    (3.0, 108.0)
    """

    default_name = "l1"
    reads_boxes = False
    align_channels = True

    def __init__(
        self,
        weight: float = 1.0,
        reduction: str = "mean",
        *,
        levels: Sequence[int] | None = None,
        source: str | Sequence[str] | None = None,
        name: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(levels=levels, source=source, name=name, backend=backend)
        self.weight = check_number("L1Loss", "weight", weight)
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"L1Loss: reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}"
            )
        self.reduction, self.normaliser = reduction, REDUCTIONS[reduction]

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], ctx: DistillContext
    ) -> dict[str, Tensor]:
        levels, s, t = zip(*self.raw_pairs(student, teacher), strict=True)
        sums = pyramid_l1(s, t, backend=self.backend)
        return {
            str(level): self.weight * self._reduced(value, x)
            for level, value, x in zip(levels, sums.unbind(), t, strict=True)
        }

    def _reduced(self, value: Tensor, like: Tensor) -> Tensor:
        if self.reduction == "sum":
            return value.sum()
        return value.mean() / like[0].numel() if self.reduction == "mean" else value.mean()

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, reduction={self.reduction!r}, {super().extra_repr()}"
