"""The calls of ``channel_kl`` that are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.channel_kl import channel_kl
from .compiling import Case

BF16, FP32 = torch.bfloat16, torch.float32

Call = Callable[[], Any]
Maps = Callable[..., Sequence[Tensor]]


def call(
    maps: Maps,
    batch: int,
    dtype: torch.dtype,
    layout: str,
    teacher_layout: str | None = None,
    teacher: torch.dtype | None = None,
    **size: Any,
) -> Call:
    """Forward and backward on the pyramids that ``maps`` makes."""

    def run() -> None:
        s = maps(batch, dtype, layout, True, **size)
        t = maps(batch, teacher or dtype, teacher_layout or layout, **size)
        channel_kl(s, t, 4.0, backend="triton").sum().backward()

    return run


def channel_kl_cases(maps: Maps) -> Iterator[Case]:
    for name, dtype in (("bf16", BF16), ("fp16", torch.float16), ("fp32", FP32)):
        for layout in ("contiguous", "channels_last"):
            for batch in (2, 16):
                yield Case("channel_kl", f"{name} {layout} n{batch}", call(maps, batch, dtype, layout))
    mixed = call(maps, 2, BF16, "contiguous", teacher=FP32)
    yield Case("channel_kl", "bf16 student, fp32 teacher", mixed)
    across = call(maps, 2, BF16, "channels_last", teacher_layout="contiguous")
    yield Case("channel_kl", "bf16 channels_last student, contiguous teacher", across, aligned=False)
    yield Case("channel_kl", "fp32 strided", call(maps, 2, FP32, "strided"), aligned=False)
