"""A backward that refuses to be differentiated again, instead of giving a gradient without a graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple:
        raise RuntimeError(
            "an ikd_fast operation was differentiated twice; its gradient has no second derivative"
        )


def differentiable_once(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """For ``torch.autograd.Function.backward``: computed without a graph, and an error where one is asked for.

    torch's own ``once_differentiable`` returns gradients that look constant when only the saved tensors
    required a gradient.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Any) -> tuple:
        with torch.no_grad():
            out = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return out
        where = [i for i, g in enumerate(out) if isinstance(g, Tensor)]
        if not where:
            return out
        anchor = torch.zeros((), requires_grad=True, device="cpu")
        refused = dict(zip(where, _Refuse.apply(anchor, *(out[i] for i in where)), strict=True))
        return tuple(refused.get(i, g) for i, g in enumerate(out))

    return wrapped
