"""FGD's forward: one pass over both maps, then two launches over what the programs left.

A program holds a block of positions of one image. It sums over channels what the four softmaxes over positions are made
of, then sums over its positions, with exponentials relative to the block's own maxima, what is wanted of every channel;
the maps' second reading comes from cache. ``fgd_reduce`` brings blocks to one maximum. ``fgd_combine`` finishes the
softmaxes over channels and the terms.
"""

import triton
import triton.language as tl

from .fgd_tiles import CHANNELS_LAST, four, image_offset, locate, tile_offsets
from .levels import pick_pointer

# What a program sums over its positions for every channel.
CONTEXT_S, CONTEXT_T, CHANNEL, ABS_S, ABS_T, FOREGROUND, BACKGROUND, SQUARE = (
    tl.constexpr(i) for i in range(8)
)
KINDS = tl.constexpr(8)
# Rows of a block's statistics: maxima, then sums of exponentials, of four softmaxes over positions (both sides'
# attentions, both sides' contexts), the number of uncovered cells, and two sums of ``fgd_reduce``.
CELLS, DISTANCE, SLOPE = (tl.constexpr(i) for i in range(8, 11))
STATS = 11


@triton.jit
def _foreground(p_boxes, p_image, o_p, height, width, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr):
    """Largest 1 / area of the image's boxes over each position; NaN where one of them is no box."""
    first, count = tl.load(p_image), tl.load(p_image + 1)
    image_h, image_w = tl.load(p_image + 2).to(tl.float32), tl.load(p_image + 3).to(tl.float32)
    row, column = (o_p // width).to(tl.float32)[None, :], (o_p % width).to(tl.float32)[None, :]
    best = tl.zeros([BLOCK_P], tl.float32)
    for begin in range(0, count, BLOCK_B):
        o_b = begin + tl.arange(0, BLOCK_B)
        m = o_b < count
        p_box = p_boxes + (first + o_b).to(tl.int64) * 4
        # Correctly rounded, as floor and ceil follow.
        x1 = tl.div_rn(tl.load(p_box, mask=m, other=0.0), image_w)
        y1 = tl.div_rn(tl.load(p_box + 1, mask=m, other=0.0), image_h)
        x2 = tl.div_rn(tl.load(p_box + 2, mask=m, other=0.0), image_w)
        y2 = tl.div_rn(tl.load(p_box + 3, mask=m, other=0.0), image_h)
        largest = tl.maximum(tl.maximum(tl.abs(x1), tl.abs(y1)), tl.maximum(tl.abs(x2), tl.abs(y2)))
        good = (x1 <= x2) & (y1 <= y2) & (largest < float("inf"))
        left, right = tl.floor(x1 * width), tl.ceil(x2 * width)
        top, bottom = tl.floor(y1 * height), tl.ceil(y2 * height)
        weight = tl.div_rn(tl.div_rn(1.0, bottom + 1 - top), right + 1 - left)
        # No area is zero: infinity marks what is no box, and wins the maximum everywhere.
        weight = tl.where(m, tl.where(good, weight, float("inf")), 0.0)[:, None]
        inside = (column >= left[:, None]) & (column <= right[:, None])
        inside &= (row >= top[:, None]) & (row <= bottom[:, None])
        best = tl.maximum(best, tl.max(tl.where(inside | (weight == float("inf")), weight, 0.0), axis=0))
    return tl.where(best == float("inf"), float("nan"), best)


@triton.jit
def _block(
    p_s, p_t, p_ws, p_wt, p_strides, p_maps, p_stats, p_partial, foreground, o_p, i_image, channel, position, width,
    map_size, stat_size, temperature,
    S_LAYOUT: tl.constexpr, T_LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    p_s += image_offset(i_image, channel, position, p_strides, S_LAYOUT)
    p_t += image_offset(i_image, channel, position, p_strides + 4, T_LAYOUT)
    m_p = o_p < position
    if S_LAYOUT == CHANNELS_LAST:
        b_x = tl.zeros([BLOCK_P, 2, 2], tl.float32)
    else:
        b_x = tl.zeros([BLOCK_C, BLOCK_P, 2, 2], tl.float32)
    for begin in tl.range(0, channel, BLOCK_C, num_stages=STAGES):
        o_c = begin + tl.arange(0, BLOCK_C)
        m_c = o_c < channel
        m = m_c[:, None] & m_p[None, :]
        o_s = tile_offsets(o_c, o_p, channel, position, width, p_strides, S_LAYOUT)
        o_t = tile_offsets(o_c, o_p, channel, position, width, p_strides + 4, T_LAYOUT)
        b_s = tl.load(p_s + o_s, mask=m, other=0.0).to(tl.float32)  # stream
        b_t = tl.load(p_t + o_t, mask=m, other=0.0).to(tl.float32)  # stream
        w_s = tl.load(p_ws + o_c, mask=m_c, other=0.0)[:, None]
        w_t = tl.load(p_wt + o_c, mask=m_c, other=0.0)[:, None]
        b_new = four(tl.abs(b_s), tl.abs(b_t), w_s * b_s, w_t * b_t)
        # Within a thread lie positions, to be kept apart; with channels innermost, channels to be summed.
        if S_LAYOUT == CHANNELS_LAST:
            b_x += tl.sum(b_new, axis=0)
        else:
            b_x += b_new
    if S_LAYOUT != CHANNELS_LAST:
        b_x = tl.sum(b_x, axis=0)
    i_side = tl.arange(0, 2)
    i_softmax = 2 * i_side[:, None] + i_side[None, :]
    b_x = tl.where((i_softmax < 2)[None, :, :], b_x / (tl.maximum(channel, 1) * temperature), b_x)
    p_map = p_maps + i_softmax[None, :, :] * map_size + o_p[:, None, None]
    tl.store(p_map, b_x, mask=m_p[:, None, None])
    tl.store(p_maps + 4 * map_size + o_p, foreground, mask=m_p)
    top = tl.max(tl.where(m_p[:, None, None], b_x, float("-inf")), axis=0)
    b_x = tl.where(m_p[:, None, None], tl.exp(b_x - top[None, :, :]), 0.0)
    tl.store(p_stats + i_softmax * stat_size, top)
    tl.store(p_stats + (4 + i_softmax) * stat_size, tl.sum(b_x, axis=0))
    b_side_s, b_side_t = tl.split(b_x)
    _, share_s = tl.split(b_side_s)
    e_t, share_t = tl.split(b_side_t)
    free = m_p & (foreground == 0)
    tl.store(p_stats + CELLS * stat_size, tl.sum(free.to(tl.float32)))
    covered, uncovered = (foreground * e_t)[None, :], tl.where(free, e_t, 0.0)[None, :]
    share_s, share_t = share_s[None, :], share_t[None, :]
    for begin in range(0, channel, BLOCK_C):
        o_c = begin + tl.arange(0, BLOCK_C)
        m_c = o_c < channel
        m = m_c[:, None] & m_p[None, :]
        o_s = tile_offsets(o_c, o_p, channel, position, width, p_strides, S_LAYOUT)
        o_t = tile_offsets(o_c, o_p, channel, position, width, p_strides + 4, T_LAYOUT)
        b_s = tl.load(p_s + o_s, mask=m, other=0.0).to(tl.float32)  # stream
        b_t = tl.load(p_t + o_t, mask=m, other=0.0).to(tl.float32)  # stream
        b_d = b_s - b_t
        b_e = b_d * b_d
        even = four(b_s * share_s, b_d, tl.abs(b_t), b_e * uncovered)
        odd = four(b_t * share_t, tl.abs(b_s), b_e * covered, b_e)
        b_sum = tl.reshape(tl.sum(tl.join(even, odd), axis=1), [BLOCK_C, KINDS])
        o_kind = o_c[:, None] * KINDS + tl.arange(0, KINDS)[None, :]
        tl.store(p_partial + o_kind, b_sum, mask=m_c[:, None])


@triton.jit(do_not_specialize=["n_images", "map_size", "stat_size"])
def fgd_forward(
    p_student,
    p_teacher,
    p_student_weight,
    p_teacher_weight,
    p_boxes,  # [B, 4]
    p_images,  # [N, 4]: first box, boxes, height, width
    p_strides,  # [L, 12]
    p_maps,  # [5, M]
    p_stats,  # [11, blocks]
    p_partial,  # [C, 8] of every block
    channels,
    heights,
    widths,
    n_images,
    map_size,
    stat_size,
    temperature,
    LEVELS: tl.constexpr,
    S_LAYOUT: tl.constexpr,
    T_LAYOUT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    level, i_image, i_block, channel, height, width, _, positions_before, blocks_before, rows_before = locate(
        channels, heights, widths, n_images, BLOCK_P, LEVELS, 1, 0, BLOCK_P, 1
    )
    position = height * width
    blocks = tl.cdiv(position, BLOCK_P)
    o_p = i_block * BLOCK_P + tl.arange(0, BLOCK_P)
    foreground = _foreground(p_boxes, p_images + i_image * 4, o_p, height, width, BLOCK_B, BLOCK_P)
    i_row = (i_image * blocks + i_block).to(tl.int64) * channel
    p_s, p_t = pick_pointer(p_student, level, LEVELS), pick_pointer(p_teacher, level, LEVELS)
    p_ws, p_wt = pick_pointer(p_student_weight, level, LEVELS), pick_pointer(p_teacher_weight, level, LEVELS)
    p_strides += level * 12
    p_maps += n_images * positions_before + i_image * position
    p_stats += n_images * blocks_before + i_image * blocks + i_block
    p_partial += (n_images.to(tl.int64) * rows_before + i_row) * KINDS
    # Products with 8 tell the compiler of 16-byte accesses. The few levels without them fetch nothing ahead.
    if (position % 8 == 0) & (channel % 8 == 0):
        _block(
            p_s, p_t, p_ws, p_wt, p_strides, p_maps, p_stats, p_partial, foreground, o_p, i_image,
            channel // 8 * 8, position // 8 * 8, width, map_size, stat_size, temperature,
            S_LAYOUT, T_LAYOUT, BLOCK_C, BLOCK_P, STAGES,
        )  # fmt: skip
    else:
        _block(
            p_s, p_t, p_ws, p_wt, p_strides, p_maps, p_stats, p_partial, foreground, o_p, i_image,
            channel, position, width, map_size, stat_size, temperature,
            S_LAYOUT, T_LAYOUT, BLOCK_C, BLOCK_P, 1,
        )  # fmt: skip
