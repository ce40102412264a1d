"""The calls of ``input_diversity`` and ``sign_step`` that are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..ops.input_diversity import input_diversity
from ..ops.sign_step import sign_step
from .compiling import Case

IMAGE, PADDED = (800, 1344), (800, 1333)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
EPS, STEP = 8.0, 2.0
STD = (58.395, 57.12, 57.375)
UNITS: dict[str, Any] = dict(radius=[EPS / s for s in STD], low=[-2.2, -2.1, -1.9], high=[2.3, 2.5, 2.7])

Call = Callable[[], Any]
Size = tuple[int, int]


def _images(batch: int, image: Size, dtype: torch.dtype, layout: str) -> torch.Tensor:
    if layout == "strided":
        return torch.empty(batch, 3, image[0], 2 * image[1], dtype=dtype, device="meta")[..., ::2]
    return torch.empty(batch, 3, *image, dtype=dtype, device="meta", memory_format=LAYOUTS[layout])


def _diversity(dtype: torch.dtype, layout: str, batch: int = 2, image: Size = IMAGE) -> Call:
    def call() -> None:
        h, w = image
        x = _images(batch, image, dtype, layout).requires_grad_()
        windows = torch.tensor([[w // 50, h // 40, w * 9 // 10, h * 9 // 10]] * batch)
        out = input_diversity(
            x, torch.tensor([image] * batch), windows, torch.empty(3, 1, 1, device="meta"), backend="triton"
        )
        out.backward(torch.empty_like(out))

    return call


def _sign(
    dtype: torch.dtype,
    layout: str,
    batch: int = 2,
    image: Size = IMAGE,
    moves: bool = True,
    step: bool = True,
) -> Call:
    def call() -> None:
        delta, x = (_images(batch, image, kind, layout) for kind in (torch.float32, dtype))
        sign_step(
            delta,
            x if step else None,
            x,
            [STEP / s for s in STD],
            frames=torch.tensor([image] * batch),
            moves=torch.empty(batch, dtype=torch.bool, device="meta") if moves else None,
            backend="triton",
            **UNITS,
        )

    return call


def diversity_cases() -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        for layout in LAYOUTS:
            yield Case("input_diversity", f"{name} {layout}", _diversity(dtype, layout))
    yield Case("input_diversity", "fp32 strided", _diversity(torch.float32, "strided"), aligned=False)
    narrow = _diversity(torch.float32, "contiguous", image=PADDED)
    yield Case("input_diversity", "fp32, 1333 columns", narrow, aligned=False)


def sign_cases() -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        for layout in LAYOUTS:
            yield Case("sign_step", f"{name} {layout}", _sign(dtype, layout))
    fp32 = torch.float32
    yield Case("sign_step", "fp32, every image moves", _sign(fp32, "contiguous", moves=False))
    yield Case("sign_step", "fp32, projection alone", _sign(fp32, "contiguous", moves=False, step=False))
    yield Case("sign_step", "fp32 strided", _sign(fp32, "strided"), aligned=False)
    yield Case("sign_step", "fp32, 1333 columns", _sign(fp32, "contiguous", image=PADDED), aligned=False)


def sized(batch: int, dtype: torch.dtype, layout: str, image: Size) -> Iterator[tuple[str, Call]]:
    """One call of each operation at an image size of multi-scale training."""
    yield "input_diversity", _diversity(dtype, layout, batch, image)
    yield "sign_step", _sign(dtype, layout, batch, image)
