"""CWD's divergence of two pyramids, forward and backward. Peers: the published form in PyTorch, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ikd_fast.kernels import channel_kl

from .problem import Problem, Scale
from .pyramids import pair_problem

TAU = 1.0


def plain_kl(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """``sum of P_T (log P_T - log P_S)`` by log_softmax and softmax of whole maps."""
    values = []
    for pair in zip(student, teacher, strict=True):
        s, t = ((x if x.dtype == torch.float64 else x.float()).flatten(2) / TAU for x in pair)
        values.append((t.softmax(2) * (t.log_softmax(2) - s.log_softmax(2))).sum((1, 2)))
    return torch.stack(values)


def channel_kl_problems(
    scale: Scale, batch: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Iterator[Problem]:
    def ours(s: Sequence[Tensor], t: Sequence[Tensor]) -> Tensor:
        return channel_kl(s, t, TAU, backend=backend)

    sides = ("channel_kl", ours, plain_kl, scale, batch, dtype, device)
    yield pair_problem(*sides, work="forward", backward=False)
    yield pair_problem(*sides)
