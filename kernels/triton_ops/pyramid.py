"""What kernels over a pyramid share: one launch for levels of any size, as tuples of pointers and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import check_index_space, table

# Elements of 4 bytes that fill a 16-byte access times two: sizes divisible by it never split an access.
ALIGN = 8


@dataclass(frozen=True)
class Grid:
    """Programs of a launch over ``[N, ...]`` levels: level ``l`` holds programs ``starts[l]..starts[l+1]-1``,
    ``blocks[l]`` of them an image."""

    blocks: tuple[int, ...]
    starts: tuple[int, ...]
    images: int

    @property
    def programs(self) -> int:
        return self.starts[-1]


def grid_of(op: str, sizes: Sequence[int], images: int, chunk: int) -> Grid:
    """``sizes[l]`` elements an image at level ``l``, ``chunk`` of them a program."""
    for level, size in enumerate(sizes):
        check_index_space(op, f"level {level}", size, chunk)
    blocks = tuple(-(-size // chunk) for size in sizes)
    starts = [0]
    for count in blocks:
        starts.append(starts[-1] + count * images)
    return Grid(blocks, tuple(starts), images)


def strides_table(*pyramids: Sequence[Tensor]) -> Tensor:
    """int64 ``[L, 4 * len(pyramids)]``: the N, C, H, W strides of each pyramid's map at every level."""
    rows = [[stride for x in maps for stride in x.stride()] for maps in zip(*pyramids, strict=True)]
    return table(rows, torch.int64, pyramids[0][0].device)
