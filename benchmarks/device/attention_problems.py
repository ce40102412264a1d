"""Attention statistics of one pyramid, forward and backward. Peers: the means in plain PyTorch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ikd_fast.kernels import attention_stats

from .problem import Outputs, Problem, Scale, name_of


def plain_means(maps: Sequence[Tensor], p: float, over: str) -> list[Tensor]:
    """As the operation gives them, one kind after the other."""
    wide = [x if x.dtype == torch.float64 else x.float() for x in maps]
    powers = [x.abs() if p == 1 else x.abs() ** p for x in wide]
    rows = [x.mean(1) for x in (*powers, *wide)]
    return rows if over == "channels" else rows + [x.mean((2, 3)) for x in (*powers, *wide)]


def attention_problems(
    scale: Scale, batch: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Iterator[Problem]:
    shapes = [(batch, scale.channels, h, w) for h, w in scale.levels()]
    one = sum(n * c * h * w for n, c, h, w in shapes) * dtype.itemsize
    height, width = scale.image
    what = f"{batch}x{scale.channels} channels of {height}x{width}, {name_of(dtype)}"

    def make(seed: int) -> tuple[list[Tensor], list[Tensor]]:
        g = torch.Generator(device).manual_seed(seed)
        maps = [torch.randn(s, generator=g, device=device).to(dtype).requires_grad_() for s in shapes]
        return maps, [torch.randn(s, generator=g, device=device) for s in _rows(shapes)]

    def run(op: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> Callable[[Any], Outputs]:
        def call(x: Any) -> Outputs:
            rows = op(x[0])
            upstream = [u.to(row.dtype) for u, row in zip(x[1], rows, strict=False)]
            return [*(row.detach() for row in rows), *torch.autograd.grad(rows, x[0], upstream)]

        return call

    for work, p, over in (("means, both ways", 1.0, "both"), ("squares over channels", 2.0, "channels")):

        def ours(maps: Sequence[Tensor], p: float = p, over: str = over) -> list[Tensor]:
            stats = attention_stats(maps, p=p, over=over, backend=backend)
            return [row for kind in stats for row in kind]

        def plain(maps: Sequence[Tensor], p: float = p, over: str = over) -> list[Tensor]:
            return plain_means(maps, p, over)

        def truth(x: Any, plain: Callable[..., list[Tensor]] = plain) -> Outputs:
            return run(plain)(([m.detach().double().requires_grad_() for m in x[0]], x[1]))

        compiled = torch.compile(plain, dynamic=False, backend=scale.compiler)
        yield Problem(
            op="attention_stats",
            group=f"attention_stats forward and backward, {work}, {what}",
            make=make,
            ours=("attention_stats", run(ours)),
            peers={"PyTorch": run(plain)},
            compiled={"PyTorch, compiled": run(compiled)},
            reference=truth,
            # Read once each way, the gradient written once.
            moved=3 * one,
            inputs=one,
            # bf16 gradients are rounded to 8 bits; means are float32 either way.
            tolerance=1e-5 if dtype == torch.float32 else 4e-3,
        )


def _rows(shapes: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, ...]]:
    """Shapes of the four kinds of means, levels within a kind."""
    positions = [(n, h, w) for n, _, h, w in shapes]
    channels = [(n, c) for n, c, _, _ in shapes]
    return [*positions, *positions, *channels, *channels]
