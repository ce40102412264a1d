"""Pyramids and contexts that several loss tests use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.losses import DistillContext, KDLoss
from tests.tolerances import TOLERANCES, assert_near


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


def assert_kernels_agree(loss: type[KDLoss], *, student: int, teacher: int) -> None:
    """A loss without parameters through the Triton kernels and the reference, on a bf16 student: values and gradients."""
    pytest.importorskip("triton", minversion="3.6", reason="needs triton >= 3.6 (Linux)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    for backend in ("reference", "triton"):
        s = [x.to(device).requires_grad_() for x in pyramid(student, 1, dtype=torch.bfloat16)]
        t = [x.to(device) for x in pyramid(teacher, 2)]
        values = loss(backend=backend)(s, t, context())
        results.append((values, torch.autograd.grad(sum(values.values()), s)))
    for key, value in results[0][0].items():
        assert results[1][0][key].item() == pytest.approx(value.item(), rel=1e-5)
    for a, b in zip(results[1][1], results[0][1], strict=True):
        assert_near(a, b, TOLERANCES[torch.bfloat16].gradient, "gradient")
