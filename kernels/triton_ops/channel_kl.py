"""Divergence of channels over positions: two launches forward, each map read once, and one backward.

Programs write partial sums and a second launch adds them, so that no float is added atomically and a repeat gives the
same bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .channel_kl_kernels import KINDS, channel_kl_backward, channel_kl_finish, channel_kl_forward
from .fgd_tiles import CHANNELS_LAST, CONTIGUOUS, STRIDED
from .launch import check_index_space, empty, empty_like, launch
from .levels import fixed
from .pyramid import Grid, grid_of, strides_table

OP = "channel_kl"
LOG2E = 1.0 / math.log(2.0)


@dataclass(frozen=True)
class Tile:
    """``depth`` times ``positions`` by ``channels`` at a time, the contiguous side the longer one. A thread holds all of
    ``depth``, and ``group`` neighbours: their maximum is found, and sums are rescaled, once for all of them. A program
    goes over about ``span`` positions, or over as many as leave at most ``runs`` of them."""

    channels: int
    positions: int
    depth: int
    group: int
    span: int
    runs: int


# Positions innermost, and channels innermost: there a tile spans more channels, so its runs are shorter.
ROWS, LAST = Tile(4, 256, 2, 4, 4096, 32), Tile(64, 16, 2, 1, 256, 64)
# The finishing launch: channels at once, so that a tile of them by runs has 4096 entries.
FINISH, FINISH_WARPS = 4096, 16


class _Plan:
    """The grid and the arguments that both directions share."""

    def __init__(self, student: Sequence[Tensor], maps: Sequence[Tensor]) -> None:
        self.images, self.channels = student[0].shape[0], [x.shape[1] for x in student]
        positions = [x.shape[2] * x.shape[3] for x in student]
        self.layout = _layout(maps)
        tile = LAST if self.layout == CHANNELS_LAST.value else ROWS
        step = tile.depth * tile.positions
        runs, steps, groups = [], [], []
        for level, (c, p) in enumerate(zip(self.channels, positions, strict=True)):
            wanted = max(1, min(-(-p // tile.span), tile.runs))
            each = -(-p // (wanted * step))  # of these steps; no run is empty
            check_index_space(OP, f"level {level}", c * p, step)
            runs.append(-(-p // (max(1, each) * step)))
            steps.append(each)
            groups.append(-(-c // tile.channels))
        tiles = [g * r for g, r in zip(groups, runs, strict=True)]
        self.grid: Grid = grid_of(OP, tiles, self.images, 1)
        rows_before = [self.images * sum(self.channels[:level]) for level in range(len(student))]
        self.rows, self.rows_before = self.images * sum(self.channels), fixed(rows_before)
        self.first = tuple(map(fixed, (self.grid.starts[:-1], self.grid.blocks, runs)))
        self.sizes = (
            *self.first,
            *map(fixed, (steps, self.channels, positions, [x.shape[3] for x in student])),
        )
        self.tile = tile
        self.options = dict(
            LEVELS=len(student),
            LAYOUT=self.layout,
            BLOCK_C=tile.channels,
            BLOCK_P=tile.positions,
            DEPTH=tile.depth,
            num_warps=4,
        )


def _layout(maps: Sequence[Tensor]) -> int:
    if all(x.is_contiguous() for x in maps):
        return int(CONTIGUOUS.value)
    if all(x.is_contiguous(memory_format=torch.channels_last) for x in maps):
        return int(CHANNELS_LAST.value)
    return int(STRIDED.value)


def forward(student: Sequence[Tensor], teacher: Sequence[Tensor], tau: float) -> tuple[Tensor, Tensor]:
    """float32 ``[L, N]`` and ``[4, R]``; see the reference."""
    plan, device = _Plan(student, [*student, *teacher]), student[0].device
    out = empty((len(student), plan.images), torch.float32, device)
    stats = empty((4, plan.rows), torch.float32, device)
    if not plan.grid.programs:
        return out.zero_(), stats.zero_()
    tile, rate = plan.tile, LOG2E / tau
    partial = empty((plan.grid.programs, KINDS.value, tile.channels), torch.float32, device)
    strides = partial if plan.layout != STRIDED.value else strides_table(student, teacher)
    launch(
        channel_kl_forward,
        plan.grid.programs,
        device,
        tuple(student),
        tuple(teacher),
        strides,
        partial,
        *plan.sizes,
        rate,
        GROUP=tile.group,
        **plan.options,
    )
    launch(
        channel_kl_finish,
        out.numel(),
        device,
        partial,
        stats,
        out,
        *plan.first,
        fixed(plan.channels),
        plan.rows_before,
        plan.images,
        plan.rows,
        rate,
        BLOCK_C=tile.channels,
        BLOCK_N=FINISH // tile.runs,
        BLOCK_R=tile.runs,
        LEVELS=len(student),
        num_warps=FINISH_WARPS,
    )
    return out, stats


def backward(
    grad: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor], stats: Tensor, tau: float
) -> list[Tensor]:
    """The gradient of every student map, in its dtype and layout."""
    device, out = student[0].device, [empty_like(x) for x in student]
    plan = _Plan(student, [*student, *teacher, *out])
    strides = stats if plan.layout != STRIDED.value else strides_table(student, teacher, out)
    launch(
        channel_kl_backward,
        plan.grid.programs,
        device,
        grad.contiguous(),
        tuple(student),
        tuple(teacher),
        tuple(out),
        strides,
        stats,
        *plan.sizes,
        plan.rows_before,
        plan.images,
        plan.rows,
        LOG2E / tau,
        **plan.options,
    )
    return out
