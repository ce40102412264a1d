"""A pyramid times MGD's keyed mask, one launch for all levels, forward and backward alike.

A program holds a block of positions. It computes their Philox words once, then multiplies a group of channels by
the mask they give, which is never stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.masked_l2 import keep_bound, mask_stream
from .launch import check_index_space, empty_like, launch
from .levels import fixed, locate, pick_int, pick_pointer
from .philox import KEY_WORDS, key_table, load_key, words
from .pyramid import grid_of, strides_table

OP = "mask_maps"


@dataclass(frozen=True)
class Tile:
    """``steps`` tiles of ``channels`` by ``positions`` a program, the contiguous side the longer one."""

    channels: int
    positions: int
    steps: int


# Enough channels a program that ten Philox rounds a position stay a few instructions an element.
ROWS, LAST = Tile(4, 512, 8), Tile(64, 32, 4)
SPAN = 512  # no program reaches further beyond the last position or channel


@triton.jit
def _keep(p_key, o_p, width, bound):
    """1.0 where the position's word keeps it, else 0.0; rows begin on a block boundary."""
    id_low, id_high, epoch, seed_low, seed_high = load_key(p_key)
    column = o_p % width
    block = (o_p // width) * ((width + 3) // 4) + column // 4
    a, b, c, d = words(block, id_low, id_high, epoch, seed_low, seed_high)
    lane = column % 4
    word = tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))
    return tl.where((word >> 8).to(tl.int32) <= bound, 1.0, 0.0)


@triton.jit
def _multiply(
    p_x,
    p_o,
    i_image,
    i_group,
    o_p,
    b_keep,
    channel,
    position,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Dense maps: both pointers advance alike."""
    base = i_image.to(tl.int64) * channel * position
    for step in range(STEPS):
        o_c = (i_group * STEPS + step) * BLOCK_C + tl.arange(0, BLOCK_C)
        m = (o_c[:, None] < channel) & (o_p[None, :] < position)
        if CHANNELS_LAST:
            o = o_p[None, :] * channel + o_c[:, None]
        else:
            o = o_c[:, None] * position + o_p[None, :]
        b_x = tl.load(p_x + base + o, mask=m, other=0.0).to(tl.float32)  # stream
        tl.store(p_o + base + o, (b_x * b_keep[None, :]).to(p_o.dtype.element_ty), mask=m)  # stream


@triton.jit
def _offsets(p_strides, i_image, o_c, o_p, width):
    """Addresses of ``[C, P]`` elements through the four strides of a map."""
    row, column = o_p // width, o_p % width
    o_position = row.to(tl.int64) * tl.load(p_strides + 2) + column.to(tl.int64) * tl.load(p_strides + 3)
    o_channel = i_image.to(tl.int64) * tl.load(p_strides) + o_c.to(tl.int64) * tl.load(p_strides + 1)
    return o_channel[:, None] + o_position[None, :]


@triton.jit(do_not_specialize=["n_images", "bound"])
def masked_pyramid(
    p_maps,
    p_out,
    p_keys,  # [L, N, 5]
    p_strides,  # [L, 8]
    starts,  # this and the next four: `fixed` tuples
    blocks,
    channels,
    positions,
    widths,
    n_images,
    bound,
    LEVELS: tl.constexpr,
    FLAT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    KEY_WORDS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STEPS: tl.constexpr,
):
    level, i_image, i_chunk = locate(starts, blocks, LEVELS)
    channel = pick_int(channels, level, LEVELS)
    position = pick_int(positions, level, LEVELS)
    width = pick_int(widths, level, LEVELS)
    p_x = pick_pointer(p_maps, level, LEVELS)
    p_o = pick_pointer(p_out, level, LEVELS)
    across = tl.cdiv(position, BLOCK_P)
    i_group = i_chunk // across
    o_p = (i_chunk % across) * BLOCK_P + tl.arange(0, BLOCK_P)
    b_keep = _keep(p_keys + (level * n_images + i_image) * KEY_WORDS, o_p, width, bound)
    if FLAT:
        # The compiler sees x // 8 * 8 to be a multiple of 8, and so uses whole 16-byte accesses in that branch.
        if CHANNELS_LAST:
            inner = channel
        else:
            inner = position
        if inner % 8 == 0:
            inner = inner // 8 * 8
            if CHANNELS_LAST:
                _multiply(
                    p_x, p_o, i_image, i_group, o_p, b_keep, inner, position, CHANNELS_LAST, BLOCK_C, STEPS
                )
            else:
                _multiply(
                    p_x, p_o, i_image, i_group, o_p, b_keep, channel, inner, CHANNELS_LAST, BLOCK_C, STEPS
                )
        else:
            _multiply(
                p_x, p_o, i_image, i_group, o_p, b_keep, channel, position, CHANNELS_LAST, BLOCK_C, STEPS
            )
    else:
        p_row = p_strides + level * 8
        for step in range(STEPS):
            o_c = (i_group * STEPS + step) * BLOCK_C + tl.arange(0, BLOCK_C)
            m = (o_c[:, None] < channel) & (o_p[None, :] < position)
            b_x = tl.load(p_x + _offsets(p_row, i_image, o_c, o_p, width), mask=m, other=0.0).to(tl.float32)
            b_y = (b_x * b_keep[None, :]).to(p_o.dtype.element_ty)
            tl.store(p_o + _offsets(p_row + 4, i_image, o_c, o_p, width), b_y, mask=m)


def _layout(maps: Sequence[Tensor]) -> tuple[bool, bool]:
    """(every map is dense in one layout, which is channels_last)."""
    if all(x.is_contiguous() for x in maps):
        return True, False
    last = all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)
    return last, last


def mask(
    maps: Sequence[Tensor],
    dtype: torch.dtype,
    ids: Sequence[int],
    levels: Sequence[int],
    seed: int,
    epoch: int,
    ratio: float,
) -> list[Tensor]:
    """Every map times its keyed mask; see the reference."""
    device, bound = maps[0].device, keep_bound(ratio)
    for i, x in enumerate(maps):
        check_index_space(OP, f"level {i}", x.shape[1] * x.shape[2] * x.shape[3], SPAN)
    out = [empty_like(x, dtype) for x in maps]
    flat, last = _layout([*maps, *out])
    tile = LAST if last else ROWS
    positions = tuple(x.shape[2] * x.shape[3] for x in maps)
    channels = tuple(x.shape[1] for x in maps)
    tiles = [
        -(-c // (tile.channels * tile.steps)) * -(-p // tile.positions)
        for c, p in zip(channels, positions, strict=True)
    ]
    grid = grid_of(OP, tiles, len(ids), 1)
    if not grid.programs:
        return out
    keys = key_table(ids, seed=seed, epoch=epoch, streams=[mask_stream(i) for i in levels], device=device)
    launch(
        masked_pyramid,
        grid.programs,
        device,
        tuple(maps),
        tuple(out),
        keys,
        keys if flat else strides_table(maps, out),
        *map(fixed, (grid.starts[:-1], grid.blocks, channels, positions, [x.shape[3] for x in maps])),
        len(ids),
        bound,
        LEVELS=len(maps),
        FLAT=flat,
        CHANNELS_LAST=last,
        KEY_WORDS=KEY_WORDS,
        BLOCK_C=tile.channels,
        BLOCK_P=tile.positions,
        STEPS=tile.steps,
        num_warps=8,
    )
    return out
