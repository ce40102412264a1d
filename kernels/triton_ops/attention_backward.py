"""Attention statistics, backward: one elementwise pass, which reads no map where f's means ask for no gradient."""

import triton
import triton.language as tl

from .attention_power import slope_of
from .fgd_tiles import image_offset, locate, tile_offsets
from .levels import pick_pointer


@triton.jit
def _write(
    p_x, p_g, p_strides, p_grad_spatial, p_grad_spatial_mean, p_grad_channel, p_grad_channel_mean,
    o_p, i_image, channel, position, width, power,
    X_LAYOUT: tl.constexpr, G_LAYOUT: tl.constexpr, POWER: tl.constexpr, POSITIVE: tl.constexpr, HAS: tl.constexpr,
    BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    p_x += image_offset(i_image, channel, position, p_strides, X_LAYOUT)
    p_g += image_offset(i_image, channel, position, p_strides + 4, G_LAYOUT)
    m_p = o_p < position
    b_spatial, b_spatial_mean = tl.zeros_like(o_p).to(tl.float32), tl.zeros_like(o_p).to(tl.float32)
    if HAS & 1:
        b_spatial = tl.load(p_grad_spatial + o_p, mask=m_p, other=0.0) / tl.maximum(channel, 1)
    if HAS & 2:
        b_spatial_mean = tl.load(p_grad_spatial_mean + o_p, mask=m_p, other=0.0) / tl.maximum(channel, 1)
    for begin in tl.range(0, channel, BLOCK_C, num_stages=STAGES):
        o_c = begin + tl.arange(0, BLOCK_C)
        m_c = o_c < channel
        m = m_c[:, None] & m_p[None, :]
        b_channel, b_channel_mean = tl.zeros_like(o_c).to(tl.float32), tl.zeros_like(o_c).to(tl.float32)
        if HAS & 4:
            b_channel = tl.load(p_grad_channel + o_c, mask=m_c, other=0.0) / position
        if HAS & 8:
            b_channel_mean = tl.load(p_grad_channel_mean + o_c, mask=m_c, other=0.0) / position
        b_g = b_channel_mean[:, None] + b_spatial_mean[None, :]
        if HAS & 5:
            o_x = tile_offsets(o_c, o_p, channel, position, width, p_strides, X_LAYOUT)
            b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)  # stream
            b_g += slope_of(b_x, power, POWER, POSITIVE) * (b_channel[:, None] + b_spatial[None, :])
        o_g = tile_offsets(o_c, o_p, channel, position, width, p_strides + 4, G_LAYOUT)
        tl.store(p_g + o_g, b_g.to(p_g.dtype.element_ty), mask=m)  # stream


@triton.jit(do_not_specialize=["n_images"])
def attention_stats_backward(
    p_maps,
    p_grads,
    p_strides,  # [L, 8]
    p_grad_spatial,  # [M]
    p_grad_spatial_mean,  # [M]
    p_grad_channel,  # [R]
    p_grad_channel_mean,  # [R]
    channels,
    heights,
    widths,
    n_images,
    power,
    LEVELS: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    G_LAYOUT: tl.constexpr,
    POWER: tl.constexpr,
    POSITIVE: tl.constexpr,
    HAS: tl.constexpr,  # which of the four gradients there are: a bit for each
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    level, i_image, i_block, channel, height, width, channels_before, positions_before, _, _ = locate(
        channels, heights, widths, n_images, BLOCK_P, LEVELS, 1, 0, BLOCK_P, 1
    )
    position = height * width
    o_p = i_block * BLOCK_P + tl.arange(0, BLOCK_P)
    p_x, p_g = pick_pointer(p_maps, level, LEVELS), pick_pointer(p_grads, level, LEVELS)
    p_strides += level * 8
    o_map = n_images.to(tl.int64) * positions_before + i_image.to(tl.int64) * position
    o_vector = n_images * channels_before + i_image * channel
    if (position % 8 == 0) & (channel % 8 == 0):
        _write(
            p_x, p_g, p_strides, p_grad_spatial + o_map, p_grad_spatial_mean + o_map, p_grad_channel + o_vector,
            p_grad_channel_mean + o_vector, o_p, i_image, channel // 8 * 8, position // 8 * 8, width, power,
            X_LAYOUT, G_LAYOUT, POWER, POSITIVE, HAS, BLOCK_C, STAGES,
        )  # fmt: skip
    else:
        _write(
            p_x, p_g, p_strides, p_grad_spatial + o_map, p_grad_spatial_mean + o_map, p_grad_channel + o_vector,
            p_grad_channel_mean + o_vector, o_p, i_image, channel, position, width, power,
            X_LAYOUT, G_LAYOUT, POWER, POSITIVE, HAS, BLOCK_C, 1,
        )  # fmt: skip
