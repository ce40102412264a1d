"""PKD's distance of a pyramid, forward and backward: the operation, the published form, and that compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.pairs import N, random_pair, step
from ikd_fast.kernels import pearson

# channels, network input, timed rounds; levels have strides 8 to 128
SIZES = {"small": (64, (256, 256), 40), "paper": (256, (800, 1344), 10)}


def standardised(x: Tensor) -> Tensor:
    """As published: one row a channel."""
    n, c, h, w = x.shape
    rows = x.permute(1, 0, 2, 3).reshape(c, -1)
    rows = (rows - rows.mean(-1, keepdim=True)) / (rows.std(-1, keepdim=True) + 1e-6)
    return rows.reshape(c, n, h, w).permute(1, 0, 2, 3)


def published(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    pairs = zip(student, teacher, strict=True)
    return torch.stack([F.mse_loss(standardised(s), standardised(t)) / 2 for s, t in pairs])


FORMS = {
    "operation": pearson,
    "published": published,
    "published_compiled": torch.compile(published, dynamic=False),
}


@pytest.fixture(scope="module", params=SIZES)
def problem(request):
    channels, image, _ = SIZES[request.param]
    return request.param, random_pair(channels, image, per_image=False)


@pytest.mark.parametrize("form", FORMS)
def test_pearson_forward_and_backward(benchmark, problem, form: str) -> None:
    name, args = problem
    channels, size, rounds = SIZES[name]
    for got, want in zip(step(FORMS[form], *args), step(published, *args), strict=True):
        # float32 means and standard deviations of up to 3e4 elements in another order
        assert (got - want).norm() <= 1e-5 * want.norm()
    benchmark.group = f"pearson forward+backward, {N}x{channels} channels, input {size}"
    benchmark.pedantic(step, args=(FORMS[form], *args), rounds=rounds, warmup_rounds=3)
