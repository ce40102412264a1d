"""What is compiled of the attention statistics: FKD's, NAD's and ACM's calls at 800x1344, levels P3 to P7 of 256 channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.attention_stats import attention_stats
from .compiling import Case

Maps = Callable[..., Sequence[Tensor]]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def stats(
    maps: Maps,
    batch: int,
    dtype: torch.dtype,
    layout: str,
    kinds: tuple[int, ...] = (0, 1, 2, 3),
    image: tuple[int, int] | None = None,
    **options: Any,
) -> Callable[[], None]:
    """Forward, and backward from the means that ``kinds`` numbers, on the pyramid that ``maps`` makes."""
    size = {} if image is None else {"image": image}

    def call() -> None:
        found = attention_stats(maps(batch, dtype, layout, True, **size), backend="triton", **options)
        rows = [x for kind in kinds for x in found[kind]]
        torch.autograd.backward(rows, [torch.empty_like(x) for x in rows])

    return call


def attention_cases(maps: Maps) -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        for layout in ("contiguous", "channels_last"):
            for batch in (2, 16):
                what = f"{name} {layout} n{batch}"
                yield Case("attention_stats", what, stats(maps, batch, dtype, layout))
            usual: dict[str, Any] = dict(maps=maps, batch=2, dtype=dtype, layout=layout)
            means = stats(**usual, kinds=(1, 3))
            yield Case("attention_stats", f"{name} {layout}, gradient of the means of X", means)
            squares = stats(**usual, kinds=(0,), p=2, over="channels")
            yield Case("attention_stats", f"{name} {layout}, squares over channels", squares)
            positive = stats(**usual, kinds=(2,), positive=True, over="positions")
            yield Case("attention_stats", f"{name} {layout}, positive over positions", positive)
    general = stats(maps, 2, torch.float32, "contiguous", p=3.5)
    yield Case("attention_stats", "fp32 contiguous, any power", general)
    strided = stats(maps, 2, torch.float32, "strided")
    yield Case("attention_stats", "fp32 strided", strided, aligned=False)
