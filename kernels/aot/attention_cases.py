"""What is compiled of the attention statistics: FKD's, NAD's and ACM's calls at 800x1344, levels P3 to P7 of 256 channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops.attention_stats import attention_stats
from .compiling import Case

Size = tuple[int, int]

IMAGE: Size = (800, 1344)
STRIDES = (8, 16, 32, 64, 128)
CHANNELS = 256
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _maps(batch: int, dtype: torch.dtype, layout: str, image: Size) -> list[Tensor]:
    out = []
    for stride in STRIDES:
        h, w = (-(-side // stride) for side in image)
        if layout == "strided":
            x = torch.empty(batch, CHANNELS, h, 2 * w, dtype=dtype, device="meta")[..., ::2]
        else:
            x = torch.empty(batch, CHANNELS, h, w, dtype=dtype, device="meta", memory_format=LAYOUTS[layout])
        out.append(x.requires_grad_())
    return out


def stats(
    batch: int,
    dtype: torch.dtype,
    layout: str,
    image: Size = IMAGE,
    kinds: tuple[int, ...] = (0, 1, 2, 3),
    **options: Any,
) -> Callable[[], None]:
    """Forward, and backward from the means that ``kinds`` numbers."""

    def call() -> None:
        found = attention_stats(_maps(batch, dtype, layout, image), backend="triton", **options)
        rows = [x for kind in kinds for x in found[kind]]
        torch.autograd.backward(rows, [torch.empty_like(x) for x in rows])

    return call


def attention_cases() -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        for layout in LAYOUTS:
            for batch in (2, 16):
                what = f"{name} {layout} n{batch}"
                yield Case("attention_stats", what, stats(batch, dtype, layout))
            usual: dict[str, Any] = dict(batch=2, dtype=dtype, layout=layout)
            means = stats(**usual, kinds=(1, 3))
            yield Case("attention_stats", f"{name} {layout}, gradient of the means of X", means)
            squares = stats(**usual, kinds=(0,), p=2, over="channels")
            yield Case("attention_stats", f"{name} {layout}, squares over channels", squares)
            positive = stats(**usual, kinds=(2,), positive=True, over="positions")
            yield Case("attention_stats", f"{name} {layout}, positive over positions", positive)
    general = stats(2, torch.float32, "contiguous", p=3.5)
    yield Case("attention_stats", "fp32 contiguous, any power", general)
    strided = stats(2, torch.float32, "strided")
    yield Case("attention_stats", "fp32 strided", strided, aligned=False)
