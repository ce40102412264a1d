"""The calls of ``ssim`` that are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops.ssim import ssim
from .compiling import Case

Maps = Callable[..., list[Tensor]]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def ssim_call(
    maps: Maps,
    batch: int,
    dtype: torch.dtype,
    layout: str,
    teacher_layout: str | None = None,
    teacher: torch.dtype | None = None,
    window: int = 11,
    **options: Any,
) -> Callable[[], Any]:
    """``options``: of ``maps``, which makes a pyramid of meta tensors."""

    def call() -> None:
        s = maps(batch, dtype, layout, True, **options)
        t = maps(batch, teacher or dtype, teacher_layout or layout, **options)
        ssim(s, t, window=window, backend="triton").sum().backward()

    return call


def ssim_cases(maps: Maps) -> Iterator[Case]:
    # Nothing streams here: a tile's rows begin anywhere.
    bf16, fp32 = DTYPES.values()
    for name, dtype in DTYPES.items():
        for layout in ("contiguous", "channels_last", "strided"):
            yield Case("ssim", f"{name} {layout}", ssim_call(maps, 2, dtype, layout), aligned=False)
    yield Case(
        "ssim", "bf16 student, fp32 teacher", ssim_call(maps, 2, bf16, "contiguous", teacher=fp32), False
    )
    mixed = ssim_call(maps, 2, bf16, "channels_last", teacher_layout="contiguous")
    yield Case("ssim", "bf16 channels_last student, contiguous teacher", mixed, aligned=False)
    for window in (17, 49):
        wide = ssim_call(maps, 2, fp32, "contiguous", window=window)
        yield Case("ssim", f"fp32, window {window}", wide, aligned=False)
