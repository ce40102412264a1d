"""What problems on pyramids share: maps, gradients, and the fields that say how much is moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .problem import Outputs, Scale, name_of


def random_pyramid(
    scale: Scale, batch: int, dtype: torch.dtype, device: torch.device, seed: int
) -> list[Tensor]:
    g = torch.Generator(device).manual_seed(seed)
    shapes = [(batch, scale.channels, h, w) for h, w in scale.levels()]
    return [torch.randn(shape, generator=g, device=device).to(dtype) for shape in shapes]


def _elements(scale: Scale, batch: int) -> int:
    return batch * scale.channels * sum(h * w for h, w in scale.levels())


def with_gradients(outputs: Outputs, upstream: Outputs, wanted: Outputs) -> list[Tensor]:
    grads = torch.autograd.grad(outputs, wanted, upstream)
    return [*(x.detach() for x in outputs), *grads]


def on_maps(op: str, scale: Scale, batch: int, dtype: torch.dtype) -> Callable[..., dict[str, Any]]:
    """The fields that all operations on two pyramids share."""
    one = _elements(scale, batch) * dtype.itemsize
    h, w = scale.image
    what = f"{batch}x{scale.channels} channels of {h}x{w}, {name_of(dtype)}"

    def fields(work: str, passes: float) -> dict[str, Any]:
        return dict(op=op, group=f"{work}, {what}", moved=int(passes * one), inputs=2 * one, maps=2 * one)

    return fields
