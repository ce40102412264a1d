"""Squared distance of features, each image's map optionally brought to norm 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ikd_fast.kernels.ops.pyramid_l2 import pyramid_l2
from ikd_fast.kernels.reference.precision import full

from .base import DistillContext, KDLoss
from .checks import check_number
from .registry import register_loss

REDUCTIONS = {
    "batch": "sum over C, H, W; divided by N",
    "mean": "mean over N, C, H, W",
    "norm": "one norm over N, C, H, W",
}
# A map of smaller norm is divided by this: a map of zeros stays one, with a gradient that fits half precision.
MIN_NORM = 1e-3


@register_loss
class L2Loss(KDLoss):
    """Squared Euclidean distance of the student's maps from the teacher's, level by level.

    ``D = S - T``, or with ``normalize`` (the default, as in the field's tool boxes) ``D = S / |S| - T / |T|``, the
    norms taken over C, H, W of each image: then ``sum D^2 = 2 - 2 cos(S, T)`` for each, whatever the scales. The loss
    of a level is ``weight`` times

    =============  ================================  ============================================
    reduction      value of a level                  normaliser
    =============  ================================  ============================================
    ``"batch"``    sum D^2 / N                       images; the default
    ``"mean"``     sum D^2 / (N C H W)               elements
    ``"norm"``     sqrt(sum D^2 + 1e-12)             none: the norm over the batch, grows as sqrt(N)
    =============  ================================  ============================================

    ``1e-12`` keeps the gradient finite at D = 0; norms below 1e-3 count as 1e-3. Where channels differ, a biased 1x1
    convolution brings S to T's (``bind``). L2 without normalisation is hint learning: Romero et al., "FitNets", ICLR
    2015. See ``AdvFeatureLoss`` for the distance per image and for leaving padding out.

    Args:
        weight: factor of every level.
        normalize: bring each image's map to norm 1 first.
        reduction: ``"batch"``, ``"mean"`` or ``"norm"``; write it in the config, as the three differ by orders.
        levels, source, name, backend: see ``KDLoss``.

    Shape: maps ``[N, C, H, W]`` of fp16, bf16, fp32 (summed in fp32; copied only to normalise) or fp64. Returns
    ``{"0": scalar, ...}``.

    >>> s, t = [torch.full((2, 4, 3, 3), 3.0)], [torch.zeros(2, 4, 3, 3)]
    >>> ctx = DistillContext([], None, [(24, 24)] * 2, (24, 24), [0, 1])
    >>> L2Loss(normalize=False, reduction="mean")(s, t, ctx)["0"].item()
    9.0
    >>> round(L2Loss()([-s[0]], s, ctx)["0"].item(), 5)  # opposite unit vectors
    4.0
    """

    default_name = "l2"
    reads_boxes = False
    align_channels = True

    def __init__(
        self,
        weight: float = 1.0,
        normalize: bool = True,
        reduction: str = "batch",
        *,
        levels: Sequence[int] | None = None,
        source: str | Sequence[str] | None = None,
        name: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(levels=levels, source=source, name=name, backend=backend)
        self.weight = check_number("L2Loss", "weight", weight)
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"L2Loss: reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}"
            )
        if not isinstance(normalize, bool):
            raise TypeError(f"L2Loss: normalize must be True or False, got {normalize!r}")
        self.normalize, self.reduction = normalize, reduction
        self.normaliser = REDUCTIONS[reduction] + (" (of maps of norm 1)" if normalize else "")

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], ctx: DistillContext
    ) -> dict[str, Tensor]:
        levels, s, t = zip(*self.raw_pairs(student, teacher), strict=True)
        if self.normalize:
            s, t = (tuple(map(_unit, maps)) for maps in (s, t))
        square = pyramid_l2(s, t, backend=self.backend)
        return {
            str(level): self.weight * self._reduced(value, x)
            for level, value, x in zip(levels, square.unbind(), t, strict=True)
        }

    def _reduced(self, square: Tensor, like: Tensor) -> Tensor:
        if self.reduction == "norm":
            return (square.sum() + 1e-12).sqrt()
        value = square.mean()
        return value / like[0].numel() if self.reduction == "mean" else value

    def extra_repr(self) -> str:
        own = f"weight={self.weight:g}, normalize={self.normalize}, reduction={self.reduction!r}"
        return f"{own}, {super().extra_repr()}"


def _unit(x: Tensor) -> Tensor:
    """Each image's map over its norm, in float32."""
    x = full(x)
    norm = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
    return x / norm.clamp_min(MIN_NORM)
