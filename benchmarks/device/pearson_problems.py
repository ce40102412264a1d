"""PKD's distance of two pyramids, forward and backward. Peers: the published form in PyTorch, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ikd_fast.kernels import pearson

from .problem import Problem, Scale
from .pyramids import pair_problem


def plain_pearson(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Both sides standardised over N, H, W, and half of their mean squared difference."""
    values = []
    for pair in zip(student, teacher, strict=True):
        full = [x if x.dtype == torch.float64 else x.float() for x in pair]
        z_s, z_t = (
            (x - x.mean((0, 2, 3), keepdim=True)) / (x.std((0, 2, 3), keepdim=True) + 1e-6) for x in full
        )
        values.append((z_s - z_t).square().mean() / 2)
    return torch.stack(values)


def pearson_problems(
    scale: Scale, batch: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Iterator[Problem]:
    def ours(s: Sequence[Tensor], t: Sequence[Tensor]) -> Tensor:
        return pearson(s, t, backend=backend)

    yield pair_problem("pearson", ours, plain_pearson, scale, batch, dtype, device, per_image=False)
