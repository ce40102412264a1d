"""CWD's divergence of a pyramid, forward and backward: the operation, the published form, and that compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.pairs import N, random_pair, step
from ikd_fast.kernels import channel_kl

# channels, network input, timed rounds; levels have strides 8 to 128
SIZES = {"small": (64, (256, 256), 40), "paper": (256, (800, 1344), 8)}


def published(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """A row a channel: the teacher's softmax times the difference of two log-softmaxes."""
    sums = []
    for s, t in zip(student, teacher, strict=True):
        rows_s, rows_t = (x.reshape(-1, x.shape[2] * x.shape[3]) for x in (s, t))
        terms = rows_t.softmax(1) * (rows_t.log_softmax(1) - rows_s.log_softmax(1))
        sums.append(terms.sum(1).view(s.shape[:2]).sum(1))
    return torch.stack(sums)


FORMS = {
    "operation": channel_kl,
    "published": published,
    "published_compiled": torch.compile(published, dynamic=False),
}


@pytest.fixture(scope="module", params=SIZES)
def problem(request):
    channels, image, _ = SIZES[request.param]
    return request.param, random_pair(channels, image)


@pytest.mark.parametrize("form", FORMS)
def test_channel_kl_forward_and_backward(benchmark, problem, form: str) -> None:
    name, args = problem
    channels, size, rounds = SIZES[name]
    for got, want in zip(step(FORMS[form], *args), step(published, *args), strict=True):
        # float32 softmaxes of up to 2e4 positions, their sums in another order
        assert (got - want).norm() <= 1e-5 * want.norm()
    benchmark.group = f"channel_kl forward+backward, {N}x{channels} channels, input {size}"
    benchmark.pedantic(step, args=(FORMS[form], *args), rounds=rounds, warmup_rounds=3)
