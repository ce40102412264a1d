"""Packed perturbations. Peers: the reference and plain PyTorch image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.packed_delta import plain_apply, plain_step, straight_map
from ikd_fast.kernels import DeltaCodes, apply_delta, fgsm_step_packed

from .image_problems import MEAN, STD
from .problem import Outputs, Problem, Scale, name_of

CODES = DeltaCodes.of(eps=8, step=2)


def delta_problems(
    scale: Scale, batch: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Iterator[Problem]:
    size, frame = scale.decoded, scale.image
    mirrored = [i % 2 == 0 for i in range(batch)]
    maps = [straight_map(size, frame, mirror) for mirror in mirrored]
    low, high = ([(v - m) / s for m, s in zip(MEAN, STD, strict=True)] for v in (0.0, 255.0))
    units = {"grey_level": [1 / s for s in STD], "low": low, "high": high}
    plain_units = [torch.tensor(v, device=device).view(3, 1, 1) for v in units.values()]
    step = torch.full((batch,), 2.0, device=device)
    packed = batch * CODES.nbytes(3, *size)
    pixels, padded = batch * 3 * size[0] * size[1], batch * 3 * frame[0] * frame[1]
    of = f"4-bit perturbations, {batch} images {size[0]}x{size[1]} in {frame[0]}x{frame[1]} {name_of(dtype)}"

    def make(seed: int) -> tuple[Tensor, list[Tensor]]:
        g = torch.Generator(device).manual_seed(seed)
        x = torch.randn(batch, 3, *frame, generator=g, device=device).to(dtype)
        codes = [
            torch.randint(CODES.levels, (3, *size), dtype=torch.uint8, generator=g, device=device)
            for _ in range(batch)
        ]
        return x, [CODES.pack(c) for c in codes]

    def apply(room: str) -> Callable[[Any], Outputs]:
        return lambda x: [apply_delta(*x, maps, CODES, **units, backend=room)]

    def move(room: str) -> Callable[[Any], Outputs]:
        return lambda x: fgsm_step_packed(*x, maps, CODES, step, backend=room)

    yield Problem(
        "apply_delta",
        f"apply_delta, {of}",
        make,
        ("apply_delta", apply(backend)),
        {
            "reference": apply("reference"),
            "PyTorch": lambda x: [plain_apply(*x, size, mirrored, CODES, *plain_units)],
        },
        lambda x: apply("reference")((x[0].double(), x[1])),
        moved=2 * padded * dtype.itemsize + packed,
        inputs=padded * dtype.itemsize + packed,
        tolerance=1e-6 if dtype == torch.float32 else 4e-3,
    )
    # One pixel a cell: no sum is rounded, so not a bit of a record may differ.
    yield Problem(
        "fgsm_step",
        f"fgsm_step_packed, {of}",
        make,
        ("fgsm_step_packed", move(backend)),
        {
            "reference": move("reference"),
            "PyTorch": lambda x: plain_step(*x, size, mirrored, CODES, step),
        },
        lambda x: move("reference")((x[0].double(), x[1])),
        moved=pixels * dtype.itemsize + 2 * packed,
        inputs=padded * dtype.itemsize + packed,
        tolerance=0.0,
    )
