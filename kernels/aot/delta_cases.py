"""What is compiled of the packed perturbations: a batch of 800x1344, cells of one pixel and of two by two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops.apply_delta import apply_delta
from ..ops.fgsm_step import fgsm_step_packed
from ..reference.delta_codes import CellMap, DeltaCodes
from .compiling import Case

Size = tuple[int, int]

IMAGE: Size = (800, 1344)
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _map(frame: Size, cells: Size) -> CellMap:
    """Pixel i lies in cell ``i * cells // frame``."""
    tables = []
    for count, n in zip(cells, frame, strict=True):
        cell = (torch.arange(n) * count // n).int()
        edges = torch.searchsorted(cell, torch.arange(count + 1, dtype=torch.int32)).int()
        tables.append((cell, torch.stack([edges[:-1], edges[1:]], 1)))
    (y_cell, y_span), (x_cell, x_span) = tables
    return CellMap(cells, x_cell, y_cell, x_span, y_span)


def _records(batch: int, codes: DeltaCodes, cells: Size) -> list[Tensor]:
    return [torch.empty(codes.nbytes(3, *cells), dtype=torch.uint8, device="meta") for _ in range(batch)]


def _stack(batch: int, image: Size, dtype: torch.dtype, layout: str) -> Tensor:
    return torch.empty(batch, 3, *image, dtype=dtype, device="meta", memory_format=LAYOUTS[layout])


def apply(
    dtype: torch.dtype,
    layout: str,
    bits: int = 4,
    batch: int = 2,
    image: Size = IMAGE,
    cells: Size | None = None,
    out: torch.dtype | None = None,
    clean: bool = False,
) -> Callable[[], Any]:
    def call() -> Any:
        codes, size = DeltaCodes.of(8, 10, bits), cells or image
        if dtype == torch.uint8:
            units: dict[str, Any] = dict(mean=MEAN, std=STD, dtype=out, clean=clean)
        else:
            low, high = ([(v - m) / s for m, s in zip(MEAN, STD, strict=True)] for v in (0.0, 255.0))
            units = dict(grey_level=[1 / s for s in STD], low=low, high=high)
        x = _stack(batch, image, dtype, layout)
        return apply_delta(
            x, _records(batch, codes, size), [_map(image, size)] * batch, codes, **units, backend="triton"
        )

    return call


def step(
    dtype: torch.dtype,
    layout: str,
    bits: int = 4,
    batch: int = 2,
    image: Size = IMAGE,
    cells: Size | None = None,
) -> Callable[[], Any]:
    def call() -> Any:
        codes, size = DeltaCodes.of(8, 10, bits), cells or image
        g = _stack(batch, image, dtype, layout)
        moves = torch.empty(batch, device="meta")
        return fgsm_step_packed(
            g, _records(batch, codes, size), [_map(image, size)] * batch, codes, moves, backend="triton"
        )

    return call


def apply_cases() -> Iterator[Case]:
    for layout in LAYOUTS:
        for name, dtype in FLOATS.items():
            yield Case("apply_delta", f"{name} {layout}", apply(dtype, layout))
            call = apply(torch.uint8, layout, out=dtype, clean=True)
            yield Case("apply_delta", f"uint8 and clean to {name} {layout}", call)
    for bits in (2, 8):
        yield Case("apply_delta", f"fp32 contiguous, {bits} bits", apply(torch.float32, "contiguous", bits))
    yield Case("apply_delta", "uint8 to bf16", apply(torch.uint8, "contiguous", out=torch.bfloat16))
    ragged = apply(torch.float32, "contiguous", image=(800, 1333))
    yield Case("apply_delta", "fp32, 1333 columns", ragged, aligned=False)


def step_cases() -> Iterator[Case]:
    for layout in LAYOUTS:
        for name, dtype in FLOATS.items():
            yield Case("fgsm_step", f"{name} {layout}", step(dtype, layout))
    for bits in (2, 8):
        yield Case("fgsm_step", f"fp32 contiguous, {bits} bits", step(torch.float32, "contiguous", bits))
    halves = step(torch.bfloat16, "contiguous", cells=(400, 672))
    yield Case("fgsm_step", "bf16, cells of 2x2", halves)
    ragged = step(torch.float32, "contiguous", cells=(800, 1333))
    yield Case("fgsm_step", "fp32, 1333 cells", ragged, aligned=False)


def sized(
    image: Size, batch: int, dtype: torch.dtype, layout: str
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """For :func:`.cases.sized_cases`: cells of the image without its padding."""
    cells = (image[0] - 3, image[1] - 11)
    yield "apply_delta", apply(dtype, layout, batch=batch, image=image, cells=cells)
    yield "fgsm_step", step(dtype, layout, batch=batch, image=image, cells=cells)
