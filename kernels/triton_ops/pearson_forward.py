"""The forward of PKD's distance: moments of tiles, then of channels, then the mean over channels.

A program of ``pearson_moments`` holds a tile of both maps, centres it on its own means, and leaves of every channel the
means, relative to one element of the channel in the whole batch, and the sums of products of deviations.
``pearson_channels`` combines the tiles of a channel: precise for maps far from 0, exact for constant ones.
"""

import triton
import triton.language as tl

from .fgd_tiles import CHANNELS_LAST, CONTIGUOUS, image_offset, tile_offsets
from .levels import locate, pick_int, pick_pointer

TINY = tl.constexpr(2.0**-63)  # the square root of the smallest normal float32


@triton.jit
def _pivot(p_x, p_strides, o_c, m_c, position, LAYOUT: tl.constexpr):
    """The first element of each channel in the first image."""
    if LAYOUT == CONTIGUOUS:
        o = o_c * position
    elif LAYOUT == CHANNELS_LAST:
        o = o_c
    else:
        o = o_c.to(tl.int64) * tl.load(p_strides + 1)
    return tl.load(p_x + o, mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def _centred(b_x, b_pivot, m, count):
    """Means relative to the pivot, and deviations from them, 0 outside the mask."""
    b_x = tl.where(m, b_x.to(tl.float32) - b_pivot[:, None], 0.0)
    mean = tl.sum(b_x, 1) / count
    return mean, tl.where(m, b_x - mean[:, None], 0.0)


@triton.jit
def _moments(
    p_s, p_t, p_strides, p_partial, size, row, i_image, o_c, o_p, count, channel, position, width,
    S_LAYOUT: tl.constexpr, T_LAYOUT: tl.constexpr,
):  # fmt: skip
    m_c = o_c < channel
    m = m_c[:, None] & (o_p < position)[None, :]
    b_pivot_s = _pivot(p_s, p_strides, o_c, m_c, position, S_LAYOUT)
    b_pivot_t = _pivot(p_t, p_strides + 4, o_c, m_c, position, T_LAYOUT)
    p_s += image_offset(i_image, channel, position, p_strides, S_LAYOUT)
    p_t += image_offset(i_image, channel, position, p_strides + 4, T_LAYOUT)
    o_s = tile_offsets(o_c, o_p, channel, position, width, p_strides, S_LAYOUT)
    o_t = tile_offsets(o_c, o_p, channel, position, width, p_strides + 4, T_LAYOUT)
    b_s = tl.load(p_s + o_s, mask=m, other=0.0)  # stream
    b_t = tl.load(p_t + o_t, mask=m, other=0.0)  # stream
    mean_s, b_s = _centred(b_s, b_pivot_s, m, count)
    mean_t, b_t = _centred(b_t, b_pivot_t, m, count)
    p_row = p_partial + row * channel + o_c
    tl.store(p_row, mean_s, mask=m_c)
    tl.store(p_row + size, mean_t, mask=m_c)
    tl.store(p_row + 2 * size, tl.sum(b_s * b_s, 1), mask=m_c)
    tl.store(p_row + 3 * size, tl.sum(b_t * b_t, 1), mask=m_c)
    tl.store(p_row + 4 * size, tl.sum(b_s * b_t, 1), mask=m_c)


@triton.jit(do_not_specialize=["size"])
def pearson_moments(
    p_student,
    p_teacher,
    p_strides,  # [L, 8]
    p_partial,  # [5, size]: of every level, [N, blocks of positions, C]
    starts,  # this and the next five: `fixed` tuples
    blocks,
    bases,
    channels,
    positions,
    widths,
    size,
    LEVELS: tl.constexpr,
    S_LAYOUT: tl.constexpr,
    T_LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    level, i_image, i_chunk = locate(starts, blocks, LEVELS)
    channel = pick_int(channels, level, LEVELS)
    position = pick_int(positions, level, LEVELS)
    width = pick_int(widths, level, LEVELS)
    p_s = pick_pointer(p_student, level, LEVELS)
    p_t = pick_pointer(p_teacher, level, LEVELS)
    p_row, p_partial = p_strides + level * 8, p_partial + pick_int(bases, level, LEVELS).to(tl.int64)
    across = tl.cdiv(position, BLOCK_P)
    i_block = i_chunk % across
    o_c = (i_chunk // across) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_p = i_block * BLOCK_P + tl.arange(0, BLOCK_P)
    count = tl.minimum(position - i_block * BLOCK_P, BLOCK_P).to(tl.float32)
    row = i_image.to(tl.int64) * across + i_block
    # Products with 8 tell the compiler of 16-byte accesses.
    if (position % 8 == 0) & (channel % 8 == 0):
        _moments(
            p_s, p_t, p_row, p_partial, size, row, i_image, o_c, o_p, count, channel // 8 * 8, position // 8 * 8,
            width, S_LAYOUT, T_LAYOUT,
        )  # fmt: skip
    else:
        _moments(
            p_s, p_t, p_row, p_partial, size, row, i_image, o_c, o_p, count, channel, position, width,
            S_LAYOUT, T_LAYOUT,
        )  # fmt: skip


@triton.jit
def _tile_rows(begin, rows, across, position, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """Row numbers of tiles, whether there are such, and how many positions each holds."""
    o_n = begin + tl.arange(0, BLOCK_N)
    m_n = o_n < rows
    count = tl.minimum(position - (o_n % across) * BLOCK_P, BLOCK_P).to(tl.float32)
    return o_n.to(tl.int64), m_n, tl.where(m_n, count, 0.0)


@triton.jit(do_not_specialize=["size", "total_channels", "n_images", "eps", "min_std"])
def pearson_channels(
    p_student,
    p_teacher,
    p_strides,  # [L, 8]
    p_partial,  # [5, size]
    p_out,  # [5, sum C]
    p_value,  # [sum C]
    starts,  # this and the next four: `fixed` tuples
    blocks,
    bases,
    firsts,
    channels,
    positions,
    size,
    total_channels,
    n_images,
    eps,
    min_std,
    LEVELS: tl.constexpr,
    S_LAYOUT: tl.constexpr,
    T_LAYOUT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    level, _, i_group = locate(starts, blocks, LEVELS)
    channel = pick_int(channels, level, LEVELS)
    position = pick_int(positions, level, LEVELS)
    o_c = i_group * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channel
    across = tl.cdiv(position, BLOCK_P)
    rows = n_images * across
    elements = tl.maximum(n_images.to(tl.float32) * position, 1.0)
    p_partial += pick_int(bases, level, LEVELS).to(tl.int64)
    shift_s, shift_t = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for begin in range(0, rows, BLOCK_N):
        o_n, m_n, count = _tile_rows(begin, rows, across, position, BLOCK_N, BLOCK_P)
        m = m_n[:, None] & m_c[None, :]
        p = p_partial + o_n[:, None] * channel + o_c[None, :]
        share = (count / elements)[:, None]
        shift_s += tl.sum(tl.load(p, mask=m, other=0.0) * share, 0)
        shift_t += tl.sum(tl.load(p + size, mask=m, other=0.0) * share, 0)
    ss, tt, st = tl.zeros_like(shift_s), tl.zeros_like(shift_s), tl.zeros_like(shift_s)
    for begin in range(0, rows, BLOCK_N):
        o_n, m_n, count = _tile_rows(begin, rows, across, position, BLOCK_N, BLOCK_P)
        m = m_n[:, None] & m_c[None, :]
        p = p_partial + o_n[:, None] * channel + o_c[None, :]
        b_s = tl.load(p, mask=m, other=0.0) - shift_s[None, :]
        b_t = tl.load(p + size, mask=m, other=0.0) - shift_t[None, :]
        ss += tl.sum(tl.load(p + 2 * size, mask=m, other=0.0) + count[:, None] * (b_s * b_s), 0)
        tt += tl.sum(tl.load(p + 3 * size, mask=m, other=0.0) + count[:, None] * (b_t * b_t), 0)
        st += tl.sum(tl.load(p + 4 * size, mask=m, other=0.0) + count[:, None] * (b_s * b_t), 0)
    free = tl.maximum(elements - 1, 1.0)
    std_s, std_t = tl.sqrt_rn(ss / free), tl.sqrt_rn(tt / free)
    u_s, u_t = std_s + eps, std_t + eps
    value = (ss / (u_s * u_s) + tt / (u_t * u_t) - 2 * (st / (u_s * u_t))) / (2 * elements)
    through = (ss / u_s - st / u_t) / (free * tl.where(std_s < TINY, TINY, std_s))
    scale = 1 / (elements * channel * (tl.where(std_s < min_std, min_std, std_s) + eps))
    slope_s, slope_t = (1 - through) * scale / u_s, scale / u_t
    p_row, m_any = p_strides + level * 8, o_c < tl.where(rows > 0, channel, 0)
    pivot_s = _pivot(pick_pointer(p_student, level, LEVELS), p_row, o_c, m_any, position, S_LAYOUT)
    pivot_t = _pivot(pick_pointer(p_teacher, level, LEVELS), p_row + 4, o_c, m_any, position, T_LAYOUT)
    mean_s, mean_t = pivot_s + shift_s, pivot_t + shift_t
    rest = slope_s * (pivot_s - mean_s + shift_s) - slope_t * (pivot_t - mean_t + shift_t)
    i_first = pick_int(firsts, level, LEVELS)
    tl.store(p_value + i_first + o_c, tl.where(value < 0, 0.0, value), mask=m_c)
    p = p_out + i_first + o_c
    tl.store(p, mean_s, mask=m_c)
    tl.store(p + total_channels, mean_t, mask=m_c)
    tl.store(p + 2 * total_channels, slope_s, mask=m_c)
    tl.store(p + 3 * total_channels, slope_t, mask=m_c)
    tl.store(p + 4 * total_channels, rest, mask=m_c)


@triton.jit
def pearson_mean(p_value, p_out, firsts, channels, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    level = tl.program_id(0)
    channel = pick_int(channels, level, LEVELS)
    p_value += pick_int(firsts, level, LEVELS)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, channel, BLOCK):
        o = begin + tl.arange(0, BLOCK)
        total += tl.load(p_value + o, mask=o < channel, other=0.0)
    tl.store(p_out + level, tl.sum(total) / tl.maximum(channel, 1))
