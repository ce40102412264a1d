"""Squared feature distance of a pyramid, forward and backward: the operation, plain autograd, and that compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.pairs import N, random_pair, step
from ikd_fast.kernels import pyramid_l2

# channels, network input, timed rounds; levels have strides 8 to 128
SIZES = {"small": (64, (256, 256), 40), "paper": (256, (800, 1344), 15)}


def eager(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    return torch.stack([(s - t).square().sum((1, 2, 3)) for s, t in zip(student, teacher, strict=True)])


FORMS = {"operation": pyramid_l2, "autograd": eager, "autograd_compiled": torch.compile(eager, dynamic=False)}


@pytest.fixture(scope="module", params=SIZES)
def problem(request):
    channels, image, _ = SIZES[request.param]
    return request.param, random_pair(channels, image)


@pytest.mark.parametrize("form", FORMS)
def test_pyramid_l2_forward_and_backward(benchmark, problem, form: str) -> None:
    name, args = problem
    channels, size, rounds = SIZES[name]
    for got, want in zip(step(FORMS[form], *args), step(eager, *args), strict=True):
        # sums of 1e7 float32 squares in another order
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    benchmark.group = f"pyramid_l2 forward+backward, {N}x{channels} channels, input {size}"
    benchmark.pedantic(step, args=(FORMS[form], *args), rounds=rounds, warmup_rounds=3)
