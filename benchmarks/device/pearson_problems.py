"""PKD's distance of two pyramids, forward and backward. Peers: the published form in PyTorch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ikd_fast.kernels import pearson

from .problem import Outputs, Problem, Scale
from .pyramids import on_maps, random_pyramid, with_gradients


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
    fields = on_maps("pearson", scale, batch, dtype)

    def make(seed: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        s, t = (random_pyramid(scale, batch, dtype, device, 2 * seed + i) for i in range(2))
        return [x.requires_grad_() for x in s], t, torch.rand(len(scale.strides), device=device)

    def both(op: Callable) -> Callable[[Any], Outputs]:
        return lambda x: with_gradients([op(x[0], x[1])], [x[2]], x[0])

    def truth(x: Any) -> Outputs:
        s = [m.detach().double().requires_grad_() for m in x[0]]
        value = plain_pearson(s, [t.double() for t in x[1]])
        return with_gradients([value], [x[2].double()], s)

    compiled = torch.compile(plain_pearson, dynamic=False, backend=scale.compiler)
    fast = batch == 2 and dtype == torch.float32
    yield Problem(
        **fields("pearson forward and backward", 5),
        make=make,
        ours=("pearson", both(lambda s, t: pearson(s, t, backend=backend))),
        peers={"PyTorch": both(plain_pearson)},
        compiled={"PyTorch, compiled": both(compiled)},
        reference=truth,
        # bf16 gradients are rounded to 8 bits; statistics are float32 either way.
        tolerance=1e-5 if dtype == torch.float32 else 4e-3,
        targets={"PyTorch": 1.5, "PyTorch, compiled": 1.0} if fast else {},
    )
