"""PKD's distance on a GPU: three launches forward, one backward, whatever the levels, channels and images.

Both maps are read once each way. Partial moments are combined by a later launch, never atomically, so that a repeat
gives the same bits. The backward is one elementwise pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fgd_tiles import CHANNELS_LAST, CONTIGUOUS, STRIDED, image_offset, tile_offsets
from .launch import check_index_space, empty, empty_like, launch
from .levels import fixed, locate, pick_int, pick_pointer
from .pearson_forward import pearson_channels, pearson_mean, pearson_moments
from .pyramid import Grid, grid_of, strides_table

OP = "pearson"
# Of a tile: two means, three sums of products. Of a channel, what the backward wants: see the reference.
MOMENTS, ROWS = 5, 5


@dataclass(frozen=True)
class Tile:
    """Channels and positions of a program, as many as registers hold in either direction."""

    channels: int
    positions: int


# 16 elements of a side a thread; fewer where three maps have theirs innermost over channels, or 64-bit addresses.
ANY = Tile(4, 256)
FORWARD = {CONTIGUOUS.value: Tile(4, 1024), CHANNELS_LAST.value: Tile(32, 128), STRIDED.value: ANY}
BACKWARD = {CONTIGUOUS.value: Tile(4, 1024), CHANNELS_LAST.value: Tile(32, 64), STRIDED.value: ANY}
SPAN = 1024  # no tile reaches further beyond the last position or channel
# Of the finishing launches: tiles read at once, channels of a program; channels of the mean.
FINISH = dict(BLOCK_N=128, BLOCK_C=8)
MEAN_BLOCK = 256


@triton.jit
def _gradient(
    p_s, p_t, p_o, p_strides, p_saved, grad, total, i_image, o_c, o_p, channel, position, width,
    S_LAYOUT: tl.constexpr, T_LAYOUT: tl.constexpr, G_LAYOUT: tl.constexpr,
):  # fmt: skip
    m_c = o_c < channel
    m = m_c[:, None] & (o_p < position)[None, :]
    p_s += image_offset(i_image, channel, position, p_strides, S_LAYOUT)
    p_t += image_offset(i_image, channel, position, p_strides + 4, T_LAYOUT)
    p_o += image_offset(i_image, channel, position, p_strides + 8, G_LAYOUT)
    mean_s = tl.load(p_saved + o_c, mask=m_c, other=0.0)[:, None]
    mean_t = tl.load(p_saved + total + o_c, mask=m_c, other=0.0)[:, None]
    slope_s = tl.load(p_saved + 2 * total + o_c, mask=m_c, other=0.0)[:, None] * grad
    slope_t = tl.load(p_saved + 3 * total + o_c, mask=m_c, other=0.0)[:, None] * grad
    rest = tl.load(p_saved + 4 * total + o_c, mask=m_c, other=0.0)[:, None] * grad
    o_s = tile_offsets(o_c, o_p, channel, position, width, p_strides, S_LAYOUT)
    o_t = tile_offsets(o_c, o_p, channel, position, width, p_strides + 4, T_LAYOUT)
    b_s = tl.load(p_s + o_s, mask=m, other=0.0)  # stream
    b_t = tl.load(p_t + o_t, mask=m, other=0.0)  # stream
    b_g = slope_s * (b_s.to(tl.float32) - mean_s) - slope_t * (b_t.to(tl.float32) - mean_t) - rest
    b_g = b_g.to(p_o.dtype.element_ty)
    o_g = tile_offsets(o_c, o_p, channel, position, width, p_strides + 8, G_LAYOUT)
    tl.store(p_o + o_g, b_g, mask=m)  # stream


@triton.jit(do_not_specialize=["total"])
def pearson_backward(
    p_grad,  # [L]
    p_student,
    p_teacher,
    p_out,
    p_strides,  # [L, 12]
    p_saved,  # [5, total]
    starts,  # this and the next five: `fixed` tuples
    blocks,
    firsts,
    channels,
    positions,
    widths,
    total,
    LEVELS: tl.constexpr,
    S_LAYOUT: tl.constexpr,
    T_LAYOUT: tl.constexpr,
    G_LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    level, i_image, i_chunk = locate(starts, blocks, LEVELS)
    channel = pick_int(channels, level, LEVELS)
    position = pick_int(positions, level, LEVELS)
    width = pick_int(widths, level, LEVELS)
    p_s = pick_pointer(p_student, level, LEVELS)
    p_t = pick_pointer(p_teacher, level, LEVELS)
    p_o = pick_pointer(p_out, level, LEVELS)
    p_row, p_saved = p_strides + level * 12, p_saved + pick_int(firsts, level, LEVELS)
    across = tl.cdiv(position, BLOCK_P)
    o_c = (i_chunk // across) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_p = (i_chunk % across) * BLOCK_P + tl.arange(0, BLOCK_P)
    grad = tl.load(p_grad + level)
    # Products with 8 tell the compiler of 16-byte accesses.
    if (position % 8 == 0) & (channel % 8 == 0):
        _gradient(
            p_s, p_t, p_o, p_row, p_saved, grad, total, i_image, o_c, o_p, channel // 8 * 8, position // 8 * 8,
            width, S_LAYOUT, T_LAYOUT, G_LAYOUT,
        )  # fmt: skip
    else:
        _gradient(
            p_s, p_t, p_o, p_row, p_saved, grad, total, i_image, o_c, o_p, channel, position, width,
            S_LAYOUT, T_LAYOUT, G_LAYOUT,
        )  # fmt: skip


def _layout(maps: Sequence[Tensor]) -> int:
    if all(x.is_contiguous() for x in maps):
        return CONTIGUOUS.value
    if all(x.is_contiguous(memory_format=torch.channels_last) for x in maps):
        return CHANNELS_LAST.value
    return STRIDED.value


class _Plan:
    """Sizes, layouts and the grid over tiles of a pyramid."""

    def __init__(self, tiles: dict[int, Tile], *pyramids: Sequence[Tensor]) -> None:
        student = pyramids[0]
        self.images, self.levels = student[0].shape[0], len(student)
        self.channels = [x.shape[1] for x in student]
        self.positions = [x.shape[2] * x.shape[3] for x in student]
        for level, (c, p) in enumerate(zip(self.channels, self.positions, strict=True)):
            check_index_space(OP, f"level {level}", c * p, SPAN)
        self.widths = [x.shape[3] for x in student]
        self.layouts = [_layout(maps) for maps in pyramids]
        same = len(set(self.layouts)) == 1
        self.tile = tiles[self.layouts[0] if same else STRIDED.value]
        self.across = [-(-p // self.tile.positions) for p in self.positions]
        counts = [-(-c // self.tile.channels) * a for c, a in zip(self.channels, self.across, strict=True)]
        self.grid = grid_of(OP, counts, self.images, 1)
        self.firsts = [sum(self.channels[:i]) for i in range(self.levels + 1)]

    def strides(self, other: Tensor, *pyramids: Sequence[Tensor]) -> Tensor:
        """The table of strides, or any pointer where none is read."""
        return strides_table(*pyramids) if STRIDED.value in self.layouts else other


def _grid(grid: Grid) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return fixed(grid.starts[:-1]), fixed(grid.blocks)


def forward(
    student: Sequence[Tensor], teacher: Sequence[Tensor], eps: float, min_std: float
) -> tuple[Tensor, Tensor]:
    """float32 values ``[L]``, and ``[5, sum C]`` for ``backward``; see the reference."""
    plan, device = _Plan(FORWARD, student, teacher), student[0].device
    total = plan.firsts[-1]
    rows = [plan.images * a * c for a, c in zip(plan.across, plan.channels, strict=True)]
    bases, size = fixed([sum(rows[:i]) for i in range(plan.levels)]), sum(rows)
    partial = empty((MOMENTS, size), torch.float32, device)
    saved = empty((ROWS, total), torch.float32, device)
    value, out = empty(total, torch.float32, device), empty(plan.levels, torch.float32, device)
    strides = plan.strides(saved, student, teacher)
    options = dict(LEVELS=plan.levels, S_LAYOUT=plan.layouts[0], T_LAYOUT=plan.layouts[1])
    launch(
        pearson_moments,
        plan.grid.programs,
        device,
        tuple(student),
        tuple(teacher),
        strides,
        partial,
        *_grid(plan.grid),
        bases,
        *map(fixed, (plan.channels, plan.positions, plan.widths)),
        size,
        **options,
        BLOCK_C=plan.tile.channels,
        BLOCK_P=plan.tile.positions,
        num_warps=8,
    )
    groups = grid_of(OP, [-(-c // FINISH["BLOCK_C"]) for c in plan.channels], 1, 1)
    launch(
        pearson_channels,
        groups.programs,
        device,
        tuple(student),
        tuple(teacher),
        strides,
        partial,
        saved,
        value,
        *_grid(groups),
        bases,
        *map(fixed, (plan.firsts[:-1], plan.channels, plan.positions)),
        size,
        total,
        plan.images,
        eps,
        min_std,
        **options,
        BLOCK_P=plan.tile.positions,
        **FINISH,
        num_warps=8,
    )
    launch(
        pearson_mean,
        plan.levels,
        device,
        value,
        out,
        *map(fixed, (plan.firsts[:-1], plan.channels)),
        LEVELS=plan.levels,
        BLOCK=MEAN_BLOCK,
        num_warps=4,
    )
    return out, saved


def backward(
    grad: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor], saved: Tensor
) -> list[Tensor]:
    """The gradient of every student map, in its dtype and layout."""
    out = [empty_like(x) for x in student]
    plan, device = _Plan(BACKWARD, student, teacher, out), student[0].device
    launch(
        pearson_backward,
        plan.grid.programs,
        device,
        grad.contiguous(),
        tuple(student),
        tuple(teacher),
        tuple(out),
        plan.strides(saved, student, teacher, out),
        saved,
        *_grid(plan.grid),
        *map(fixed, (plan.firsts[:-1], plan.channels, plan.positions, plan.widths)),
        plan.firsts[-1],
        LEVELS=plan.levels,
        S_LAYOUT=plan.layouts[0],
        T_LAYOUT=plan.layouts[1],
        G_LAYOUT=plan.layouts[2],
        BLOCK_C=plan.tile.channels,
        BLOCK_P=plan.tile.positions,
        num_warps=8,
    )
    return out
