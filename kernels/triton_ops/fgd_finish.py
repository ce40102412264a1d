"""FGD's finishing launches: blocks brought to one maximum, softmaxes over channels, the terms, the weights' gradient."""

import triton
import triton.language as tl

from .fgd_forward import (
    ABS_S,
    ABS_T,
    BACKGROUND,
    CELLS,
    CHANNEL,
    CONTEXT_S,
    CONTEXT_T,
    DISTANCE,
    FOREGROUND,
    KINDS,
    SLOPE,
)
from .fgd_tiles import locate, sign, softmax_total


@triton.jit
def _reduce_vectors(
    p_stats, p_partial, p_vectors, p_work, i_chunk, count, channel, position, stat_size, vector_size,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, PART_C: tl.constexpr,
):  # fmt: skip
    """Per-channel sums of an image over its blocks, those relative to a block's maximum brought to one maximum."""
    top_t, total_t = softmax_total(p_stats + stat_size, p_stats + 5 * stat_size, count, BLOCK)
    top_zs, total_zs = softmax_total(p_stats + 2 * stat_size, p_stats + 6 * stat_size, count, BLOCK)
    top_zt, total_zt = softmax_total(p_stats + 3 * stat_size, p_stats + 7 * stat_size, count, BLOCK)
    i_kind = tl.arange(0, KINDS)
    is_focus = (i_kind == FOREGROUND) | (i_kind == BACKGROUND)
    is_mean = (i_kind == ABS_S) | (i_kind == ABS_T)
    relative = is_focus | (i_kind <= CONTEXT_T)
    row = tl.where(is_focus, 1, tl.where(i_kind == CONTEXT_S, 2, 3))
    top = tl.where(is_focus, top_t, tl.where(i_kind == CONTEXT_S, top_zs, top_zt))
    total = tl.where(is_focus, total_t, tl.where(i_kind == CONTEXT_S, total_zs, total_zt))
    o_c = i_chunk * PART_C + tl.arange(0, PART_C)
    o_row = o_c[:, None] * KINDS + i_kind[None, :]
    b_sum = tl.zeros([BLOCK_N, PART_C, KINDS], tl.float32)
    for begin in range(0, count, BLOCK_N):
        o_n = begin + tl.arange(0, BLOCK_N)
        m_n = (o_n < count)[:, None]
        o_stat = o_n[:, None] + row[None, :] * stat_size
        scale = tl.exp(tl.load(p_stats + o_stat, mask=m_n, other=float("-inf")) - top[None, :])
        scale = tl.where(relative[None, :], scale, 1.0)
        m = m_n[:, :, None] & (o_c < channel)[None, :, None]
        o = o_n.to(tl.int64)[:, None, None] * channel * KINDS + o_row[None, :, :]
        b_sum += tl.load(p_partial + o, mask=m, other=0.0) * scale[:, None, :]
    divisor = tl.where(relative, total, tl.where(is_mean, position.to(tl.float32), 1.0))
    factor = tl.where(is_focus, position.to(tl.float32), 1.0) / tl.where(divisor == 0, 1.0, divisor)
    p_out = tl.where(i_kind <= CHANNEL, p_vectors, p_work - 3 * vector_size) + i_kind * vector_size
    b_sum = tl.sum(b_sum, axis=0) * factor[None, :]
    tl.store(p_out[None, :] + o_c[:, None], b_sum, mask=(o_c < channel)[:, None])


@triton.jit
def _reduce_positions(
    p_stats, p_maps, i_chunk, count, position, map_size, stat_size,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, PART_P: tl.constexpr,
):  # fmt: skip
    """sum |Ss - St| and sum sign(Ss - St) Ss over a chunk of positions, kept beside its first block's statistics."""
    top_s, total_s = softmax_total(p_stats, p_stats + 4 * stat_size, count, BLOCK)
    top_t, total_t = softmax_total(p_stats + stat_size, p_stats + 5 * stat_size, count, BLOCK)
    o_p = i_chunk * PART_P + tl.arange(0, PART_P)
    m = o_p < position
    a_s = tl.load(p_maps + o_p, mask=m, other=float("-inf"))
    a_t = tl.load(p_maps + map_size + o_p, mask=m, other=float("-inf"))
    spatial = tl.exp(a_s - top_s) / total_s * position
    difference = spatial - tl.exp(a_t - top_t) / total_t * position
    p_first = p_stats + i_chunk * (PART_P // BLOCK_P)
    tl.store(p_first + DISTANCE * stat_size, tl.sum(tl.abs(difference)))
    tl.store(p_first + SLOPE * stat_size, tl.sum(sign(difference) * spatial))


@triton.jit(do_not_specialize=["n_images", "map_size", "stat_size", "vector_size"])
def fgd_reduce(
    p_maps,  # [5, M]
    p_stats,  # [11, blocks]
    p_partial,  # [C, 8] of every block
    p_vectors,  # [3, R]
    p_work,  # [5, R]
    channels,
    heights,
    widths,
    n_images,
    map_size,
    stat_size,
    vector_size,
    LEVELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART_C: tl.constexpr,
    PART_P: tl.constexpr,
):
    (
        _,
        i_image,
        i_part,
        channel,
        height,
        width,
        channels_before,
        positions_before,
        blocks_before,
        rows_before,
    ) = locate(channels, heights, widths, n_images, BLOCK_P, LEVELS, PART_C, 1, PART_P, 1)
    position = height * width
    count = tl.cdiv(position, BLOCK_P)
    p_stats += n_images * blocks_before + i_image * count
    chunks = tl.cdiv(channel, PART_C)
    if i_part < chunks:
        rows = n_images.to(tl.int64) * rows_before + (i_image * count).to(tl.int64) * channel
        o_vector = n_images * channels_before + i_image * channel
        _reduce_vectors(
            p_stats, p_partial + rows * KINDS, p_vectors + o_vector, p_work + o_vector, i_part, count, channel, position,
            stat_size, vector_size, BLOCK, BLOCK_N, PART_C,
        )  # fmt: skip
    else:
        p_maps += n_images * positions_before + i_image * position
        _reduce_positions(
            p_stats, p_maps, i_part - chunks, count, position, map_size, stat_size,
            BLOCK, BLOCK_P, PART_P,
        )  # fmt: skip


@triton.jit
def _total(p, count, STEP: tl.constexpr, BLOCK: tl.constexpr):
    b_sum = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, count, BLOCK * STEP):
        o = begin + tl.arange(0, BLOCK) * STEP
        b_sum += tl.load(p + o, mask=o < count, other=0.0)
    return tl.sum(b_sum)


@triton.jit
def _channel_softmax(p, channel, temperature, BLOCK: tl.constexpr):
    b_top = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in range(0, channel, BLOCK):
        o = begin + tl.arange(0, BLOCK)
        b_top = tl.maximum(b_top, tl.load(p + o, mask=o < channel, other=float("-inf")) / temperature)
    top = tl.max(b_top)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, channel, BLOCK):
        o = begin + tl.arange(0, BLOCK)
        b_sum += tl.exp(tl.load(p + o, mask=o < channel, other=float("-inf")) / temperature - top)
    return top, tl.sum(b_sum)


@triton.jit(do_not_specialize=["n_images", "stat_size", "vector_size"])
def fgd_combine(
    p_stats,  # [11, blocks]
    p_work,  # [5, R]: mean |S|, mean |T|, sums of focused D^2 on foreground and on uncovered cells, sum of D^2
    p_terms,  # [4, L, N]
    p_factors,  # [2, R]
    p_scalars,  # [10, L, N]
    channels,
    heights,
    widths,
    n_images,
    stat_size,
    vector_size,
    temperature,
    LEVELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PART_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a level and image: softmaxes over channels, the four terms, what the backward wants."""
    level, i_image, _, channel, height, width, channels_before, _, blocks_before, _ = locate(
        channels, heights, widths, n_images, BLOCK_P, LEVELS, 1, 0, 1, 0
    )
    position = height * width
    count = tl.cdiv(position, BLOCK_P)
    p_stats += n_images * blocks_before + i_image * count
    size = LEVELS * n_images
    p_terms += level * n_images + i_image
    p_scalars += level * n_images + i_image
    for i in tl.static_range(4):
        top, total = softmax_total(p_stats + i * stat_size, p_stats + (4 + i) * stat_size, count, BLOCK)
        tl.store(p_scalars + i * size, top)
        tl.store(p_scalars + (4 + i) * size, total)
    cells = _total(p_stats + CELLS * stat_size, count, 1, BLOCK)
    distance = _total(p_stats + DISTANCE * stat_size, count, PART_P // BLOCK_P, BLOCK)
    slope = _total(p_stats + SLOPE * stat_size, count, PART_P // BLOCK_P, BLOCK)
    tl.store(p_scalars + 8 * size, slope / tl.maximum(position, 1))
    tl.store(p_scalars + 9 * size, cells)

    p_s = p_work + n_images * channels_before + i_image * channel
    p_factors += n_images * channels_before + i_image * channel
    p_t = p_s + vector_size
    top_s, total_s = _channel_softmax(p_s, channel, temperature, BLOCK)
    top_t, total_t = _channel_softmax(p_t, channel, temperature, BLOCK)
    b_distance = tl.zeros([BLOCK], tl.float32)
    b_slope = tl.zeros([BLOCK], tl.float32)
    b_foreground = tl.zeros([BLOCK], tl.float32)
    b_background = tl.zeros([BLOCK], tl.float32)
    b_square = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, channel, BLOCK):
        o = begin + tl.arange(0, BLOCK)
        m = o < channel
        b_s = tl.exp(tl.load(p_s + o, mask=m, other=float("-inf")) / temperature - top_s) / total_s * channel
        b_t = tl.exp(tl.load(p_t + o, mask=m, other=float("-inf")) / temperature - top_t) / total_t * channel
        b_distance += tl.abs(b_s - b_t)
        b_slope += sign(b_s - b_t) * b_s
        b_foreground += b_t * tl.load(p_t + vector_size + o, mask=m, other=0.0)
        b_background += b_t * tl.load(p_t + 2 * vector_size + o, mask=m, other=0.0)
        b_square += tl.load(p_t + 3 * vector_size + o, mask=m, other=0.0)
        tl.store(p_factors + o, b_t, mask=m)
    tl.store(p_terms, tl.sum(b_foreground))
    tl.store(p_terms + size, tl.sum(b_background) / tl.maximum(cells, 1.0))
    tl.store(p_terms + 2 * size, distance + tl.sum(b_distance))
    tl.store(p_terms + 3 * size, tl.sum(b_square))
    mean_slope = tl.sum(b_slope) / tl.maximum(channel, 1)
    for begin in range(0, channel, BLOCK):
        o = begin + tl.arange(0, BLOCK)
        m = o < channel
        b_s = tl.exp(tl.load(p_s + o, mask=m, other=float("-inf")) / temperature - top_s) / total_s * channel
        b_t = tl.exp(tl.load(p_t + o, mask=m, other=float("-inf")) / temperature - top_t) / total_t * channel
        b_out = b_s * (sign(b_s - b_t) - mean_slope) / (tl.maximum(position, 1) * temperature)
        tl.store(p_factors + vector_size + o, b_out, mask=m)


@triton.jit(do_not_specialize=["n_images", "channel_sum"])
def fgd_weights(
    p_partial,  # [C, 2] of every block
    p_out,  # [2, sum C]
    channels,
    heights,
    widths,
    n_images,
    channel_sum,
    LEVELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART_C: tl.constexpr,
):
    """The gradient of a chunk of one side's context weights, from all blocks of all images of a level."""
    _, i_side, i_chunk, channel, height, width, channels_before, _, _, rows_before = locate(
        channels, heights, widths, 2, BLOCK_P, LEVELS, PART_C, 1, 1, 0
    )
    count = n_images * tl.cdiv(height * width, BLOCK_P)
    p_partial += n_images.to(tl.int64) * rows_before * 2
    o_c = i_chunk * PART_C + tl.arange(0, PART_C)
    b_sum = tl.zeros([BLOCK_N, PART_C], tl.float32)
    for begin in range(0, count, BLOCK_N):
        o_n = begin + tl.arange(0, BLOCK_N)
        m = (o_n[:, None] < count) & (o_c[None, :] < channel)
        o = (o_n.to(tl.int64)[:, None] * channel + o_c[None, :]) * 2 + i_side
        b_sum += tl.load(p_partial + o, mask=m, other=0.0)
    tl.store(p_out + i_side * channel_sum + channels_before + o_c, tl.sum(b_sum, axis=0), mask=o_c < channel)
