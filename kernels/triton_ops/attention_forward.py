"""Attention statistics, forward: one pass over the maps, and a launch that adds what its programs left of every channel."""

import triton
import triton.language as tl

from .attention_power import power_of
from .fgd_tiles import CHANNELS_LAST, image_offset, locate, tile_offsets
from .levels import pick_pointer


@triton.jit
def _read(
    p_x, p_strides, p_spatial, p_spatial_mean, p_partial, o_p, i_image, channel, position, width, power,
    LAYOUT: tl.constexpr, POWER: tl.constexpr, POSITIVE: tl.constexpr, SPATIAL: tl.constexpr, CHANNEL: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    p_x += image_offset(i_image, channel, position, p_strides, LAYOUT)
    m_p = o_p < position
    if LAYOUT == CHANNELS_LAST:
        b_sum = tl.zeros([BLOCK_P, 2], tl.float32)
    else:
        b_sum = tl.zeros([BLOCK_C, BLOCK_P, 2], tl.float32)
    i_kind = tl.arange(0, 2)
    for begin in tl.range(0, channel, BLOCK_C, num_stages=STAGES):
        o_c = begin + tl.arange(0, BLOCK_C)
        m_c = o_c < channel
        o = tile_offsets(o_c, o_p, channel, position, width, p_strides, LAYOUT)
        b_x = tl.load(p_x + o, mask=m_c[:, None] & m_p[None, :], other=0.0).to(tl.float32)  # stream
        b_both = tl.join(power_of(b_x, power, POWER, POSITIVE), b_x)
        if SPATIAL:
            # Within a thread lie positions, to be kept apart; with channels innermost, channels to be summed.
            if LAYOUT == CHANNELS_LAST:
                b_sum += tl.sum(b_both, axis=0)
            else:
                b_sum += b_both
        if CHANNEL:
            o_partial = o_c[:, None] * 2 + i_kind[None, :]
            tl.store(p_partial + o_partial, tl.sum(b_both, axis=1), mask=m_c[:, None])
    if SPATIAL:
        if LAYOUT != CHANNELS_LAST:
            b_sum = tl.sum(b_sum, axis=0)
        b_mean = b_sum / tl.maximum(channel, 1)
        b_spatial, b_spatial_mean = tl.split(b_mean)
        tl.store(p_spatial + o_p, b_spatial, mask=m_p)
        tl.store(p_spatial_mean + o_p, b_spatial_mean, mask=m_p)


@triton.jit(do_not_specialize=["n_images"])
def attention_stats_forward(
    p_maps,
    p_strides,  # [L, 4]
    p_spatial,  # [M]
    p_spatial_mean,  # [M]
    p_partial,  # [C, 2] of every block
    channels,
    heights,
    widths,
    n_images,
    power,
    LEVELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    POWER: tl.constexpr,
    POSITIVE: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    level, i_image, i_block, channel, height, width, _, positions_before, _, rows_before = locate(
        channels, heights, widths, n_images, BLOCK_P, LEVELS, 1, 0, BLOCK_P, 1
    )
    position = height * width
    o_p = i_block * BLOCK_P + tl.arange(0, BLOCK_P)
    p_x = pick_pointer(p_maps, level, LEVELS)
    p_strides += level * 4
    o_map = n_images.to(tl.int64) * positions_before + i_image.to(tl.int64) * position
    i_row = (i_image * tl.cdiv(position, BLOCK_P) + i_block).to(tl.int64) * channel
    p_partial += (n_images.to(tl.int64) * rows_before + i_row) * 2
    # Products with 8 tell the compiler of 16-byte accesses. The few levels without them fetch nothing ahead.
    if (position % 8 == 0) & (channel % 8 == 0):
        _read(
            p_x, p_strides, p_spatial + o_map, p_spatial_mean + o_map, p_partial, o_p, i_image, channel // 8 * 8,
            position // 8 * 8, width, power, LAYOUT, POWER, POSITIVE, SPATIAL, CHANNEL, BLOCK_C, BLOCK_P, STAGES,
        )  # fmt: skip
    else:
        _read(
            p_x, p_strides, p_spatial + o_map, p_spatial_mean + o_map, p_partial, o_p, i_image, channel,
            position, width, power, LAYOUT, POWER, POSITIVE, SPATIAL, CHANNEL, BLOCK_C, BLOCK_P, 1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_images"])
def attention_stats_finish(
    p_partial,  # [C, 2] of every block
    p_channel,  # [R]
    p_channel_mean,  # [R]
    channels,
    heights,
    widths,
    n_images,
    LEVELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART_C: tl.constexpr,
):
    _, i_image, i_part, channel, height, width, channels_before, _, _, rows_before = locate(
        channels, heights, widths, n_images, BLOCK_P, LEVELS, PART_C, 1, BLOCK_P, 0
    )
    position = height * width
    count = tl.cdiv(position, BLOCK_P)
    p_partial += (n_images.to(tl.int64) * rows_before + (i_image * count).to(tl.int64) * channel) * 2
    i_kind = tl.arange(0, 2)
    o_c = i_part * PART_C + tl.arange(0, PART_C)
    o_row = o_c[:, None] * 2 + i_kind[None, :]
    m_c = (o_c < channel)[:, None]
    b_sum = tl.zeros([BLOCK_N, PART_C, 2], tl.float32)
    for begin in range(0, count, BLOCK_N):
        o_n = begin + tl.arange(0, BLOCK_N)
        m = (o_n < count)[:, None, None] & m_c[None, :, :]
        o = o_n.to(tl.int64)[:, None, None] * channel * 2 + o_row[None, :, :]
        b_sum += tl.load(p_partial + o, mask=m, other=0.0)
    b_mean = tl.sum(b_sum, axis=0) / tl.maximum(position, 1)
    b_channel, b_channel_mean = tl.split(b_mean)
    o_vector = n_images * channels_before + i_image * channel + o_c
    tl.store(p_channel + o_vector, b_channel, mask=o_c < channel)
    tl.store(p_channel_mean + o_vector, b_channel_mean, mask=o_c < channel)
