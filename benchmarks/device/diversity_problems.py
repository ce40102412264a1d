"""Input diversity with its gradient, and a signed step. Peers: the reference and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ikd_fast.kernels import input_diversity, sign_step

from .problem import Outputs, Problem, Scale, name_of

STD = (58.395, 57.12, 57.375)
UNITS: dict[str, Any] = dict(radius=[8 / s for s in STD], low=[-2.2, -2.1, -1.9], high=[2.3, 2.5, 2.7])
STEP = [2 / s for s in STD]


def diversity_problems(
    scale: Scale, batch: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Iterator[Problem]:
    h, w = scale.image
    # Shrink factors 0.9 to 1, at offsets that fit, as rate 0.9 draws them.
    windows = []
    for i in range(batch):
        share = 0.9 + 0.1 * i / batch
        w_out, h_out = int(share * w), int(share * h)
        windows.append(((w - w_out) // 2, (h - h_out) // 3, w_out, h_out))
    frames, places = torch.tensor([[h, w]] * batch), torch.tensor(windows)

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator(device).manual_seed(seed)
        x, upstream = (torch.rand(batch, 3, h, w, generator=g, device=device).to(dtype) for _ in range(2))
        return x.requires_grad_(), upstream, torch.zeros(3, 1, 1, device=device)

    def step(view: Callable[[Tensor, Tensor], Tensor], x: Tensor, upstream: Tensor, fill: Tensor) -> Outputs:
        out = view(x, fill)
        return [out.detach(), torch.autograd.grad(out, x, upstream)[0]]

    def run(room: str) -> Callable[[Any], Outputs]:
        return lambda given: step(lambda x, f: input_diversity(x, frames, places, f, backend=room), *given)

    def plain(x: Tensor, fill: Tensor) -> Tensor:
        rows = []
        for image, (x0, y0, w_out, h_out) in zip(x.split(1), windows, strict=True):
            small = F.interpolate(image, size=(h_out, w_out), mode="bilinear", align_corners=False)
            rows.append(F.pad(small, (x0, w - x0 - w_out, y0, h - y0 - h_out)))
        return torch.cat(rows)

    def truth(given: tuple[Tensor, Tensor, Tensor]) -> Outputs:
        x, *others = (v.detach().double() for v in given)
        return run("reference")((x.requires_grad_(), *others))

    size = 3 * batch * h * w * dtype.itemsize
    yield Problem(
        "input_diversity",
        f"input_diversity, forward and gradient, {batch} images {h}x{w} {name_of(dtype)}",
        make,
        ("input_diversity", run(backend)),
        {"reference": run("reference"), "F.interpolate + F.pad": lambda given: step(plain, *given)},
        truth,
        moved=4 * size,
        inputs=2 * size,
        # The reference's float32 knows coordinates of 1344 to 1e-4.
        tolerance=1e-3 if dtype == torch.float32 else 4e-3,
    )


def sign_problems(
    scale: Scale, batch: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Iterator[Problem]:
    h, w = scale.image
    size = 3 * batch * h * w
    frames = torch.tensor([[h - h // 40, w]] * batch)

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        g = torch.Generator(device).manual_seed(seed)
        delta, direction, x = (torch.randn(batch, 3, h, w, generator=g, device=device) for _ in range(3))
        return (
            delta * 0.1,
            direction.to(dtype),
            x.to(dtype),
            torch.ones(batch, dtype=torch.bool, device=device),
        )

    def run(room: str) -> Callable[[Any], Outputs]:
        def call(given: Any) -> Outputs:
            delta, direction, x, moves = given
            return [sign_step(delta, direction, x, STEP, **UNITS, frames=frames, moves=moves, backend=room)]

        return call

    def truth(given: Any) -> Outputs:
        delta, direction, x, moves = given
        return run("reference")((delta.double(), direction.double(), x.double(), moves))

    yield Problem(
        "sign_step",
        f"sign_step, {batch} images {h}x{w}, perturbation float32, gradient and images {name_of(dtype)}",
        make,
        ("sign_step", run(backend)),
        {"reference": run("reference")},
        truth,
        moved=size * (8 + 2 * dtype.itemsize),
        inputs=size * (4 + 2 * dtype.itemsize),
        # The sum with a pixel up to 5 rounds to 2^-22, of perturbations of a tenth.
        tolerance=1e-5,
    )
