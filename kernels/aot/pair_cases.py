"""The calls of operations on two pyramids that are compiled: ``channel_kl``, ``pearson``, ``ssim``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops.channel_kl import channel_kl
from ..ops.pearson import pearson
from ..ops.ssim import ssim
from .compiling import Case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPS: dict[str, Callable[..., Tensor]] = {
    "channel_kl": partial(channel_kl, tau=4.0),
    "pearson": pearson,
    "ssim": partial(ssim, window=11),
}

Maps = Callable[..., Sequence[Tensor]]


def pair_call(
    op: Callable[..., Tensor],
    maps: Maps,
    batch: int,
    dtype: torch.dtype,
    layout: str,
    teacher_layout: str | None = None,
    teacher: torch.dtype | None = None,
    **size: Any,
) -> Callable[[], Any]:
    """Forward and backward on the pyramids of meta tensors that ``maps`` makes."""

    def call() -> None:
        s = maps(batch, dtype, layout, True, **size)
        t = maps(batch, teacher or dtype, teacher_layout or layout, **size)
        op(s, t, backend="triton").sum().backward()

    return call


def _mixed_cases(stem: str, maps: Maps, aligned: bool) -> Iterator[Case]:
    """Sides of other dtypes and layouts."""
    op = OPS[stem]
    mixed = pair_call(op, maps, 2, BF16, "contiguous", teacher=FP32)
    yield Case(stem, "bf16 student, fp32 teacher", mixed, aligned=aligned)
    across = pair_call(op, maps, 2, BF16, "channels_last", teacher_layout="contiguous")
    yield Case(stem, "bf16 channels_last student, contiguous teacher", across, aligned=False)


def _streamed_cases(stem: str, maps: Maps, dtypes: dict[str, torch.dtype]) -> Iterator[Case]:
    for name, dtype in dtypes.items():
        for layout in ("contiguous", "channels_last"):
            for batch in (2, 16):
                call = pair_call(OPS[stem], maps, batch, dtype, layout)
                yield Case(stem, f"{name} {layout} n{batch}", call)
    yield from _mixed_cases(stem, maps, aligned=True)
    yield Case(stem, "fp32 strided", pair_call(OPS[stem], maps, 2, FP32, "strided"), aligned=False)


def channel_kl_cases(maps: Maps) -> Iterator[Case]:
    return _streamed_cases("channel_kl", maps, {"bf16": BF16, "fp16": FP16, "fp32": FP32})


def pearson_cases(maps: Maps) -> Iterator[Case]:
    return _streamed_cases("pearson", maps, {"bf16": BF16, "fp32": FP32})


def ssim_cases(maps: Maps) -> Iterator[Case]:
    # Nothing streams here: a tile's rows begin anywhere.
    for name, dtype in (("bf16", BF16), ("fp32", FP32)):
        for layout in ("contiguous", "channels_last", "strided"):
            call = pair_call(OPS["ssim"], maps, 2, dtype, layout)
            yield Case("ssim", f"{name} {layout}", call, aligned=False)
    yield from _mixed_cases("ssim", maps, aligned=False)
    for window in (17, 49):
        wide = pair_call(partial(ssim, window=window), maps, 2, FP32, "contiguous")
        yield Case("ssim", f"fp32, window {window}", wide, aligned=False)
