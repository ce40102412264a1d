"""Checks that every operation on two pyramids passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


def assert_compiles_whole(
    loss: Callable[[list[Tensor], list[Tensor]], Tensor], student: list[Tensor], teacher: list[Tensor]
) -> None:
    """One graph, whose value and gradients are eager mode's, bit for bit."""
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for f in (loss, compiled):
        mine = [x.clone().requires_grad_() for x in student]
        value = f(mine, teacher)
        results.append([value.detach(), *torch.autograd.grad(value, mine)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def assert_differentiable_once(op: Callable[[list[Tensor], list[Tensor]], Tensor]) -> None:
    """Instead of a second derivative that is silently wrong: an error."""
    s, t = torch.rand(2, 1, 2, 3, 3, dtype=torch.float64).unbind()
    (grad,) = torch.autograd.grad(op([s.requires_grad_()], [t]).sum(), s, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        grad.sum().backward()


def by_name(
    op: Callable[..., Tensor], student: list[Tensor], teacher: list[Tensor], *, launches: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of the kernels' and the reference's value and gradients, each asked for by name; only the kernels launch, so often."""
    from ikd_fast.kernels.triton_ops.launch import trace

    results = []
    for backend in ("triton", "reference"):
        mine = [x.clone().requires_grad_() for x in student]
        with trace() as record:
            out = op(mine, teacher, backend=backend)
            grads = torch.autograd.grad(out.sum(), mine)
        assert len(record.launches) == (launches if backend == "triton" else 0)
        results.append((out.detach(), *grads))
    yield from zip(*results, strict=True)
