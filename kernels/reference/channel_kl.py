"""Channel-wise divergence: each channel's map as a distribution over positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.checks import check_pyramids, check_temperature
from .precision import full


def channel_kl(student: Sequence[Tensor], teacher: Sequence[Tensor], tau: float = 1.0) -> Tensor:
    """``out[l, n] = sum over c of KL(P_T || P_S)``, ``P_X = softmax_hw(X[n, c] / tau)``: ``[levels, N]``.

    Not scaled: CWD is ``tau^2 / (N C)`` times the sum over images. Zero exactly when S - T is constant in
    every channel. Shu et al., "Channel-wise knowledge distillation for dense prediction", ICCV 2021.

    >>> channel_kl([torch.zeros(1, 2, 3, 3)], [torch.ones(1, 2, 3, 3)])
    tensor([[0.]])
    """
    check_pyramids("channel_kl", student, teacher)
    check_temperature("channel_kl", tau)
    out = []
    for s, t in zip(student, teacher, strict=True):
        log_s, log_t = ((full(x) / tau).flatten(2).log_softmax(-1) for x in (s, t))
        out.append(F.kl_div(log_s, log_t, reduction="none", log_target=True).sum((1, 2)))
    return torch.stack(out)
