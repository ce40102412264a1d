"""Pyramids and contexts that several loss tests use."""

from __future__ import annotations

import torch
from torch import Tensor

from ikd_fast.losses import DistillContext


def boxes(count: int, height: int, width: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(count, 2, generator=g) for _ in range(2))
    return torch.cat([torch.minimum(a, b), torch.maximum(a, b)], 1) * torch.tensor(
        [width, height, width, height]
    )


def context(n: int = 2, count: int = 4, **changes) -> DistillContext:
    sizes = [(90 - 7 * i, 120) for i in range(n)]
    values = {
        "boxes": [boxes(count, *size, seed=i) for i, size in enumerate(sizes)],
        "labels": None,
        "image_sizes": sizes,
        "input_size": (96, 128),
        "image_ids": [100 + i for i in range(n)],
        "epoch": 1,
        "seed": 2,
    }
    return DistillContext(**{**values, **changes})


def pyramid(
    channels: int, seed: int, n: int = 2, dtype=torch.float32, levels=((12, 16), (6, 8), (3, 4))
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, channels, h, w, generator=g, dtype=torch.float64).to(dtype) for h, w in levels]


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter drawn anew, so that layers that start at zero take part."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.3)
