"""MGD, forward and backward: the masked pyramid and the whole loss beside the published form, whose mask is torch.rand.

The draw is the work of both: keyed Philox words here, the process's generator there. They are checked to agree on a
mask that both are given.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ikd_fast import DistillContext, MGDLoss
from ikd_fast.kernels import keyed_mask, mask_maps

N, RATIO, IDS = 2, 0.65, [11, 12]
Draw = Callable[[Tensor, int], Tensor]
# channels, network input, timed rounds; levels have strides 8 to 128
SIZES = {"small": (64, (256, 256), 40), "paper": (256, (800, 1344), 10)}


def drawn(x: Tensor, level: int) -> Tensor:
    """The published draw: uniform numbers, then two selections."""
    u = torch.rand((x.shape[0], 1, *x.shape[2:]))
    return torch.where(u > 1 - RATIO, 0, 1)


def keyed(x: Tensor, level: int) -> Tensor:
    return keyed_mask(IDS, x.shape[2], x.shape[3], ratio=RATIO, level=level, epoch=1)


def published_maps(maps: list[Tensor], draw: Draw = drawn) -> list[Tensor]:
    return [torch.mul(x, draw(x, level)) for level, x in enumerate(maps)]


def operation(maps: list[Tensor]) -> list[Tensor]:
    return mask_maps(maps, IDS, ratio=RATIO, seed=0, epoch=1)


def published_loss(
    loss: MGDLoss, student: list[Tensor], teacher: list[Tensor], ctx: DistillContext, draw: Draw = drawn
) -> Tensor:
    total = torch.zeros(())
    for level, (x, t) in enumerate(zip(published_maps(student, draw), teacher, strict=True)):
        error = F.mse_loss(loss.generation[str(level)](x), t, reduction="sum")
        total = total + loss.alpha * error / x.shape[0]
    return total


def library_loss(loss: MGDLoss, student: list[Tensor], teacher: list[Tensor], ctx: DistillContext) -> Tensor:
    return torch.stack(list(loss(student, teacher, ctx).values())).sum()


def pyramid(size: str, seed: int) -> list[Tensor]:
    channels, (h, w), _ = SIZES[size]
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(N, channels, -(-h // s), -(-w // s), generator=g) for s in (8, 16, 32, 64, 128)]


def maps_step(form, maps: list[Tensor], upstream: list[Tensor]) -> tuple[Tensor, ...]:
    out = form(maps)
    return *(x.detach() for x in out), *torch.autograd.grad(out, maps, upstream)


def loss_step(form, loss: MGDLoss, student: list[Tensor], *rest) -> tuple[Tensor, ...]:
    value = form(loss, student, *rest)
    return value.detach(), *torch.autograd.grad(value, [*student, *loss.parameters()])


@pytest.fixture(scope="module", params=SIZES)
def maps_problem(request):
    maps, upstream = [x.requires_grad_() for x in pyramid(request.param, 0)], pyramid(request.param, 1)
    ours = maps_step(operation, maps, upstream)
    theirs = maps_step(lambda x: published_maps(x, keyed), maps, upstream)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    return request.param, (maps, upstream)


@pytest.fixture(scope="module")
def loss_problem():
    """The small size: at the paper's the convolutions, the same in both forms, are seconds and all of the time."""
    torch.manual_seed(0)
    channels, (h, w), _ = SIZES["small"]
    loss = MGDLoss(alpha=2e-5, mask_ratio=RATIO, channels=channels, num_levels=5)
    ctx = DistillContext([], None, [(h, w)] * N, (h, w), IDS, epoch=1)
    args = (loss, [x.requires_grad_() for x in pyramid("small", 0)], pyramid("small", 1), ctx)
    theirs = loss_step(lambda *x: published_loss(*x, draw=keyed), *args)
    for a, b in zip(loss_step(library_loss, *args), theirs, strict=True):
        # float32 sums of up to 1e5 terms in another order
        assert (a - b).norm() <= 1e-5 * b.norm()
    return args


@pytest.mark.parametrize("form", ["operation", "published"])
def test_masked_pyramid_forward_and_backward(benchmark, maps_problem, form: str) -> None:
    name, args = maps_problem
    channels, size, rounds = SIZES[name]
    benchmark.group = f"masked pyramid forward+backward, {N}x{channels} channels, input {size}"
    function = {"operation": operation, "published": published_maps}[form]
    benchmark.pedantic(maps_step, args=(function, *args), rounds=rounds, warmup_rounds=3)


@pytest.mark.parametrize("form", ["library", "published"])
def test_mgd_forward_and_backward(benchmark, loss_problem, form: str) -> None:
    channels, size, _ = SIZES["small"]
    benchmark.group = f"MGD forward+backward, {N}x{channels} channels, input {size}"
    function = {"library": library_loss, "published": published_loss}[form]
    benchmark.pedantic(loss_step, args=(function, *loss_problem), rounds=20, warmup_rounds=3)
