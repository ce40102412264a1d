"""CWD's divergence of two pyramids, forward and backward. Peers: the published form in PyTorch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ikd_fast.kernels import channel_kl

from .problem import Outputs, Problem, Scale
from .pyramids import on_maps, random_pyramid, with_gradients

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
    fields = on_maps("channel_kl", scale, batch, dtype)
    levels = len(scale.strides)

    def make(seed: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        s, t = (random_pyramid(scale, batch, dtype, device, 2 * seed + i) for i in range(2))
        return [x.requires_grad_() for x in s], t, torch.rand(levels, batch, device=device)

    def both(op: Callable) -> Callable[[Any], Outputs]:
        return lambda x: with_gradients([op(x[0], x[1])], [x[2]], x[0])

    def forward(op: Callable) -> Callable[[Any], Outputs]:
        return lambda x: [op([s.detach() for s in x[0]], x[1])]

    def ours(s: Sequence[Tensor], t: Sequence[Tensor]) -> Tensor:
        return channel_kl(s, t, TAU, backend=backend)

    def truth(x: Any) -> Outputs:
        s = [m.detach().double().requires_grad_() for m in x[0]]
        value = plain_kl(s, [t.double() for t in x[1]])
        return with_gradients([value], [x[2].double()], s)

    compiled = torch.compile(plain_kl, dynamic=False, backend=scale.compiler)
    fast = batch == 2 and dtype == torch.float32
    yield Problem(
        **fields("channel_kl forward", 2),
        make=make,
        ours=("channel_kl", forward(ours)),
        peers={"PyTorch": forward(plain_kl)},
        reference=lambda x: truth(x)[:1],
        tolerance=1e-5,
    )
    yield Problem(
        **fields("channel_kl forward and backward", 5),
        make=make,
        ours=("channel_kl", both(ours)),
        peers={"PyTorch": both(plain_kl)},
        compiled={"PyTorch, compiled": both(compiled)},
        reference=truth,
        # bf16 gradients are rounded to 8 bits; softmaxes are float32 either way.
        tolerance=1e-5 if dtype == torch.float32 else 4e-3,
        targets={"PyTorch": 1.5, "PyTorch, compiled": 1.0} if fast else {},
    )
