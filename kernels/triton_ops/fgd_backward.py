"""FGD's backward: one pass over both maps, which writes the student's gradient and partial gradients of the weights."""

import triton
import triton.language as tl

from .fgd_tiles import CHANNELS_LAST, image_offset, locate, sign, tile_offsets
from .levels import pick_pointer


@triton.jit
def _softmax(p_maps, p_scalars, i_softmax, o_p, m, map_size, size):
    top, total = tl.load(p_scalars + i_softmax * size), tl.load(p_scalars + (4 + i_softmax) * size)
    return tl.exp(tl.load(p_maps + i_softmax * map_size + o_p, mask=m, other=float("-inf")) - top) / total


@triton.jit
def _block(
    p_s, p_t, p_g, p_ws, p_strides, p_grad_terms, p_grad_vectors, p_vectors, p_maps, p_factors, p_scalars, p_partial,
    o_p, i_image, channel, position, width, map_size, vector_size, size, temperature,
    S_LAYOUT: tl.constexpr, T_LAYOUT: tl.constexpr, G_LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    p_s += image_offset(i_image, channel, position, p_strides, S_LAYOUT)
    p_t += image_offset(i_image, channel, position, p_strides + 4, T_LAYOUT)
    p_g += image_offset(i_image, channel, position, p_strides + 8, G_LAYOUT)
    m_p = o_p < position
    if S_LAYOUT == CHANNELS_LAST:
        b_score = tl.zeros([BLOCK_P, 2], tl.float32)
    else:
        b_score = tl.zeros([BLOCK_C, BLOCK_P, 2], tl.float32)
    for begin in tl.range(0, channel, BLOCK_C, num_stages=STAGES):
        o_c = begin + tl.arange(0, BLOCK_C)
        m_c = o_c < channel
        m = m_c[:, None] & m_p[None, :]
        o_s = tile_offsets(o_c, o_p, channel, position, width, p_strides, S_LAYOUT)
        o_t = tile_offsets(o_c, o_p, channel, position, width, p_strides + 4, T_LAYOUT)
        b_s = tl.load(p_s + o_s, mask=m, other=0.0).to(tl.float32)  # stream
        b_t = tl.load(p_t + o_t, mask=m, other=0.0).to(tl.float32)  # stream
        grad_s = tl.load(p_grad_vectors + o_c, mask=m_c, other=0.0)[:, None]
        grad_t = tl.load(p_grad_vectors + vector_size + o_c, mask=m_c, other=0.0)[:, None]
        mean_s = tl.load(p_vectors + o_c, mask=m_c, other=0.0)[:, None]
        mean_t = tl.load(p_vectors + vector_size + o_c, mask=m_c, other=0.0)[:, None]
        b_new = tl.join(grad_s * (b_s - mean_s), grad_t * (b_t - mean_t))
        if S_LAYOUT == CHANNELS_LAST:
            b_score += tl.sum(b_new, axis=0)
        else:
            b_score += b_new
    if S_LAYOUT != CHANNELS_LAST:
        b_score = tl.sum(b_score, axis=0)
    score_s, score_t = tl.split(b_score)

    spatial_s = _softmax(p_maps, p_scalars, 0, o_p, m_p, map_size, size) * position
    spatial_t = _softmax(p_maps, p_scalars, 1, o_p, m_p, map_size, size) * position
    share_s = _softmax(p_maps, p_scalars, 2, o_p, m_p, map_size, size)
    slope_s = share_s * score_s
    slope_t = _softmax(p_maps, p_scalars, 3, o_p, m_p, map_size, size) * score_t
    foreground = tl.load(p_maps + 4 * map_size + o_p, mask=m_p, other=0.0)
    on_background = tl.load(p_grad_terms + size) / tl.maximum(tl.load(p_scalars + 9 * size), 1.0)
    error = tl.load(p_grad_terms) * foreground + tl.where(foreground == 0, on_background, 0.0)
    error = 2.0 * spatial_t * error
    attention = tl.load(p_grad_terms + 2 * size)
    side = sign(spatial_s - spatial_t) - tl.load(p_scalars + 8 * size)
    spatial_slope = attention * spatial_s * side / (channel * temperature)
    square = 2.0 * tl.load(p_grad_terms + 3 * size)

    for begin in range(0, channel, BLOCK_C):
        o_c = begin + tl.arange(0, BLOCK_C)
        m_c = o_c < channel
        m = m_c[:, None] & m_p[None, :]
        o_s = tile_offsets(o_c, o_p, channel, position, width, p_strides, S_LAYOUT)
        o_t = tile_offsets(o_c, o_p, channel, position, width, p_strides + 4, T_LAYOUT)
        o_g = tile_offsets(o_c, o_p, channel, position, width, p_strides + 8, G_LAYOUT)
        b_s = tl.load(p_s + o_s, mask=m, other=0.0).to(tl.float32)  # stream
        b_t = tl.load(p_t + o_t, mask=m, other=0.0).to(tl.float32)  # stream
        b_sum = tl.sum(tl.join(b_s * slope_s[None, :], b_t * slope_t[None, :]), axis=1)
        tl.store(p_partial + o_c[:, None] * 2 + tl.arange(0, 2)[None, :], b_sum, mask=m_c[:, None])
        channel_t = tl.load(p_factors + o_c, mask=m_c, other=0.0)
        channel_slope = attention * tl.load(p_factors + vector_size + o_c, mask=m_c, other=0.0)
        grad_s = tl.load(p_grad_vectors + o_c, mask=m_c, other=0.0)
        grad_d = tl.load(p_grad_vectors + 2 * vector_size + o_c, mask=m_c, other=0.0)
        weight = tl.load(p_ws + o_c, mask=m_c, other=0.0)
        b_g = (b_s - b_t) * (channel_t[:, None] * error[None, :] + square)
        b_g += sign(b_s) * (channel_slope[:, None] + spatial_slope[None, :])
        b_g += grad_d[:, None] + grad_s[:, None] * share_s[None, :] + weight[:, None] * slope_s[None, :]
        tl.store(p_g + o_g, b_g.to(p_g.dtype.element_ty), mask=m)  # stream


@triton.jit(do_not_specialize=["n_images", "map_size", "vector_size"])
def fgd_backward(
    p_student,
    p_teacher,
    p_grad,
    p_student_weight,
    p_strides,  # [L, 12]
    p_grad_terms,  # [4, L, N]
    p_grad_vectors,  # [3, R]
    p_vectors,  # [3, R]
    p_maps,  # [5, M]
    p_factors,  # [2, R]
    p_scalars,  # [10, L, N]
    p_partial,  # [C, 2] of every block
    channels,
    heights,
    widths,
    n_images,
    map_size,
    vector_size,
    temperature,
    LEVELS: tl.constexpr,
    S_LAYOUT: tl.constexpr,
    T_LAYOUT: tl.constexpr,
    G_LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    level, i_image, i_block, channel, height, width, channels_before, positions_before, _, rows_before = (
        locate(channels, heights, widths, n_images, BLOCK_P, LEVELS, 1, 0, BLOCK_P, 1)
    )
    position = height * width
    o_p = i_block * BLOCK_P + tl.arange(0, BLOCK_P)
    i_row = (i_image * tl.cdiv(position, BLOCK_P) + i_block).to(tl.int64) * channel
    o_vector = n_images * channels_before + i_image * channel
    o_scalar = level * n_images + i_image
    p_s, p_t, p_g = (
        pick_pointer(p_student, level, LEVELS),
        pick_pointer(p_teacher, level, LEVELS),
        pick_pointer(p_grad, level, LEVELS),
    )
    p_ws = pick_pointer(p_student_weight, level, LEVELS)
    p_strides += level * 12
    p_maps += n_images * positions_before + i_image * position
    p_partial += (n_images.to(tl.int64) * rows_before + i_row) * 2
    size = LEVELS * n_images
    # Products with 8 tell the compiler of 16-byte accesses. The few levels without them fetch nothing ahead.
    if (position % 8 == 0) & (channel % 8 == 0):
        _block(
            p_s, p_t, p_g, p_ws, p_strides, p_grad_terms + o_scalar, p_grad_vectors + o_vector, p_vectors + o_vector,
            p_maps, p_factors + o_vector, p_scalars + o_scalar, p_partial, o_p, i_image,
            channel // 8 * 8, position // 8 * 8, width, map_size, vector_size, size, temperature,
            S_LAYOUT, T_LAYOUT, G_LAYOUT, BLOCK_C, BLOCK_P, STAGES,
        )  # fmt: skip
    else:
        _block(
            p_s, p_t, p_g, p_ws, p_strides, p_grad_terms + o_scalar, p_grad_vectors + o_vector, p_vectors + o_vector,
            p_maps, p_factors + o_vector, p_scalars + o_scalar, p_partial, o_p, i_image,
            channel, position, width, map_size, vector_size, size, temperature,
            S_LAYOUT, T_LAYOUT, G_LAYOUT, BLOCK_C, BLOCK_P, 1,
        )  # fmt: skip
