"""Channel-wise distillation (CWD)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ikd_fast.kernels.ops.channel_kl import channel_kl

from .base import DistillContext, KDLoss
from .checks import check_number
from .presets import resolve
from .registry import register_loss

DEFAULTS = {"tau": 1.0, "weight": 5.0, "levels": None}


@register_loss
class CWDLoss(KDLoss):
    """Every channel of the student's map, as a distribution over positions, must be the teacher's.

    ``L = weight * tau^2 / (N C) * sum over n, c of KL(P_T || P_S)`` for every level, ``P_X[n, c] = softmax over h, w of
    X[n, c] / tau``, C the teacher's channels. Divided by N and C, not by H, W. The gradient in S is ``weight * tau / (N C)
    (P_S - P_T)``. Zero where S - T is constant in every channel, and blind to such constants.

    Shu et al., "Channel-wise knowledge distillation for dense prediction", ICCV 2021, where ``weight`` is alpha and
    ``tau`` the temperature T. The defaults are those published for detectors' feature pyramids; its segmentation
    logits take ``weight=3, tau=4``. Where channels differ, a biased 1x1 convolution brings S to T's (``bind``). Logits
    are maps as well: ``source="bbox_head.gfl_cls"`` or the like distils a class head.

    Args:
        preset: ``"retinanet"``, ``"faster_rcnn"`` or ``"gfl"`` (for its class logits) sets the published numbers;
            arguments given beside it win.
        tau: temperature, > 0, default 1.
        weight: of every level, default 5.
        levels, source, name, backend: see ``KDLoss``.

    Shape: maps ``[N, C, H, W]`` of fp16, bf16, fp32 (computed in fp32, never copied) or fp64. Returns ``{"0": scalar,
    ...}``.

    >>> import math
    >>> import torch
    >>> teacher = torch.tensor([0.0, 0.0, 0.0, math.log(3.0)]).view(1, 1, 2, 2)  # softmax 1/6, 1/6, 1/6, 1/2
    >>> ctx = DistillContext([], None, [(16, 16)], (16, 16), [0])
    >>> loss = CWDLoss(weight=1.0)
    >>> round(loss([torch.zeros(1, 1, 2, 2)], [teacher], ctx)["0"].item(), 6)  # sum of P_T log(4 P_T)
    0.143841
    >>> loss([teacher + 2.0], [teacher], ctx)["0"].item() < 1e-6
    True
    """

    default_name = "cwd"
    normaliser = "sum over C of divergences; divided by N and C"
    reads_boxes = False
    align_channels = True

    def __init__(
        self,
        preset: str | None = None,
        tau: float | None = None,
        weight: float | None = None,
        *,
        levels: Sequence[int] | None = None,
        source: str | Sequence[str] | None = None,
        name: str | None = None,
        backend: str = "auto",
    ) -> None:
        given = {"tau": tau, "weight": weight, "levels": levels}
        values = resolve("CWDLoss", preset, given, DEFAULTS)
        super().__init__(levels=values["levels"], source=source, name=name, backend=backend)
        self.tau = check_number("CWDLoss", "tau", values["tau"], above=0)
        self.weight = check_number("CWDLoss", "weight", values["weight"])

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], ctx: DistillContext
    ) -> dict[str, Tensor]:
        levels, s, t = zip(*self.raw_pairs(student, teacher), strict=True)
        means = channel_kl(s, t, self.tau, backend=self.backend).mean(1).unbind()
        factor = self.weight * self.tau**2
        return {
            str(level): value * (factor / x.shape[1])
            for level, value, x in zip(levels, means, t, strict=True)
        }

    def extra_repr(self) -> str:
        return f"tau={self.tau}, weight={self.weight}, {super().extra_repr()}"
