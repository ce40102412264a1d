"""Attention statistics of a pyramid, forward and backward: the operation, plain autograd, and that compiled."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import attention_stats

N = 2
# channels, network input, timed rounds; levels have strides 8 to 128
SIZES = {"small": (64, (256, 256), 40), "paper": (256, (800, 1344), 15)}


def eager(maps: Sequence[Tensor]) -> list[Tensor]:
    """Four means a level, as FKD and FGD are usually written."""
    kinds = ((x.abs().mean(1), x.mean(1), x.abs().mean((2, 3)), x.mean((2, 3))) for x in maps)
    return [row for kind in zip(*kinds, strict=True) for row in kind]


def operation(maps: Sequence[Tensor]) -> list[Tensor]:
    return [row for kind in attention_stats(maps) for row in kind]


FORMS = {
    "operation": operation,
    "autograd": eager,
    "autograd_compiled": torch.compile(eager, dynamic=False),
}


def step(form, maps: list[Tensor], upstream: list[Tensor]) -> tuple[Tensor, ...]:
    rows = form(maps)
    return *(row.detach() for row in rows), *torch.autograd.grad(rows, maps, upstream)


@pytest.fixture(scope="module", params=SIZES)
def problem(request):
    channels, (h, w), _ = SIZES[request.param]
    g = torch.Generator().manual_seed(0)
    shapes = [(N, channels, -(-h // s), -(-w // s)) for s in (8, 16, 32, 64, 128)]
    maps = [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]
    upstream = [torch.rand(row.shape, generator=g) for row in eager(maps)]
    return request.param, (maps, upstream)


@pytest.mark.parametrize("form", FORMS)
def test_attention_stats_forward_and_backward(benchmark, problem, form: str) -> None:
    name, args = problem
    channels, size, rounds = SIZES[name]
    for got, want in zip(step(FORMS[form], *args), step(eager, *args), strict=True):
        # means of up to 16800 float32 entries near 1 in another order
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    benchmark.group = f"attention_stats forward+backward, {N}x{channels} channels, input {size}"
    benchmark.pedantic(step, args=(FORMS[form], *args), rounds=rounds, warmup_rounds=3)
