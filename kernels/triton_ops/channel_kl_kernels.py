"""The kernels of ``channel_kl``.

Forward: a program holds a few channels of one image and a run of their positions. Each of its lanes keeps both maps'
maxima so far, the sums of exponentials relative to them and the teacher's expectation of the difference, all brought to
a new maximum once for several elements; at the end the lanes are brought together. The finishing launch brings the runs
of a channel together and adds the channels. Backward: one elementwise pass over the same grid.
"""

import torch
import triton
import triton.language as tl

from .fgd_tiles import CHANNELS_LAST, CONTIGUOUS, STRIDED, image_offset
from .levels import locate, pick_int, pick_pointer

# Of a channel and run: both maxima, both sums, the sum of e_t ((t - top_t) - (s - top_s)).
KINDS = tl.constexpr(5)
# No finite number is below: the maximum of a lane that has seen nothing.
LOW = tl.constexpr(torch.finfo(torch.float32).min)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _offsets(p_strides, o_c, o_p, channel, position, width, LAYOUT: tl.constexpr):
    """``[D, C, P]`` addresses within an image."""
    if LAYOUT == CONTIGUOUS:
        o = o_c * position + o_p
    elif LAYOUT == CHANNELS_LAST:
        o = o_p * channel + o_c
    else:
        o_row = (o_p // width).to(tl.int64) * tl.load(p_strides + 2)
        o_column = (o_p % width).to(tl.int64) * tl.load(p_strides + 3)
        o = o_c.to(tl.int64) * tl.load(p_strides + 1) + (o_row + o_column)
    return o


@triton.jit
def _moved(sum_t, up_t, up_s):
    """What the teacher's expectation gains when the maxima fall by ``up_t`` and ``up_s``; 0 of an empty lane."""
    return tl.where(sum_t == 0.0, 0.0, sum_t * (up_t - up_s))


@triton.jit
def _lanes(x, GROUP: tl.constexpr):
    """``[D, C, P]`` as ``[D, C, P / GROUP, GROUP]``: elements of one thread lie along the first and the last."""
    return tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // GROUP, GROUP])


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, axis=3), axis=0)


@triton.jit
def _max(x):
    return tl.max(tl.max(x, axis=3), axis=0)


@triton.jit
def _sums(
    p_s, p_t, p_strides, p_out, i_image, i_group, i_run, steps, channel, position, width, rate,
    LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    p_s += image_offset(i_image, channel, position, p_strides, LAYOUT)
    p_t += image_offset(i_image, channel, position, p_strides + 4, LAYOUT)
    o_c = i_group * BLOCK_C + tl.arange(0, BLOCK_C)[None, :, None]
    o_d = tl.arange(0, DEPTH)[:, None, None] * BLOCK_P + tl.arange(0, BLOCK_P)[None, None, :]
    top_s = tl.full([BLOCK_C, BLOCK_P // GROUP], LOW, tl.float32)
    top_t = tl.full([BLOCK_C, BLOCK_P // GROUP], LOW, tl.float32)
    sum_s = tl.zeros([BLOCK_C, BLOCK_P // GROUP], tl.float32)
    sum_t = tl.zeros([BLOCK_C, BLOCK_P // GROUP], tl.float32)
    expected = tl.zeros([BLOCK_C, BLOCK_P // GROUP], tl.float32)
    for step in range(steps):
        o_p = (i_run * steps + step) * (DEPTH * BLOCK_P) + o_d
        m = (o_c < channel) & (o_p < position)
        o_s = _offsets(p_strides, o_c, o_p, channel, position, width, LAYOUT)
        o_t = _offsets(p_strides + 4, o_c, o_p, channel, position, width, LAYOUT)
        b_s = tl.load(p_s + o_s, mask=m, other=float("-inf")).to(tl.float32)  # stream
        b_t = tl.load(p_t + o_t, mask=m, other=float("-inf")).to(tl.float32)  # stream
        b_s, b_t = _lanes(b_s, GROUP), _lanes(b_t, GROUP)
        new_s, new_t = tl.maximum(top_s, _max(b_s)), tl.maximum(top_t, _max(b_t))
        expected += _moved(sum_t, top_t - new_t, top_s - new_s)
        scale = tl.exp2((top_t - new_t) * rate)
        expected, sum_t = expected * scale, sum_t * scale
        sum_s *= tl.exp2((top_s - new_s) * rate)
        top_s, top_t = new_s, new_t
        b_s, b_t = b_s - top_s[None, :, :, None], b_t - top_t[None, :, :, None]
        b_e = tl.exp2(b_t * rate)
        sum_s += _sum(tl.exp2(b_s * rate))
        sum_t += _sum(b_e)
        expected += _sum(tl.where(_lanes(m, GROUP), b_e * (b_t - b_s), 0.0))
    all_s, all_t = tl.max(top_s, axis=1), tl.max(top_t, axis=1)
    up_s, up_t = top_s - all_s[:, None], top_t - all_t[:, None]
    scale = tl.exp2(up_t * rate)
    expected = tl.sum((expected + _moved(sum_t, up_t, up_s)) * scale, axis=1)
    o = tl.arange(0, BLOCK_C)
    p_out += tl.program_id(0).to(tl.int64) * (KINDS * BLOCK_C)
    tl.store(p_out + o, all_s)
    tl.store(p_out + BLOCK_C + o, all_t)
    tl.store(p_out + 2 * BLOCK_C + o, tl.sum(sum_s * tl.exp2(up_s * rate), axis=1))
    tl.store(p_out + 3 * BLOCK_C + o, tl.sum(sum_t * scale, axis=1))
    tl.store(p_out + 4 * BLOCK_C + o, expected)


@triton.jit
def channel_kl_forward(
    p_student,
    p_teacher,
    p_strides,  # [L, 8]
    p_partial,  # [programs, 5, BLOCK_C]
    starts,  # this and the next six: `fixed` tuples
    blocks,
    runs,
    steps,
    channels,
    positions,
    widths,
    rate,  # log2(e) / tau
    LEVELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    level, i_image, i_part = locate(starts, blocks, LEVELS)
    run, step = pick_int(runs, level, LEVELS), pick_int(steps, level, LEVELS)
    channel, position = pick_int(channels, level, LEVELS), pick_int(positions, level, LEVELS)
    width = pick_int(widths, level, LEVELS)
    p_s, p_t = pick_pointer(p_student, level, LEVELS), pick_pointer(p_teacher, level, LEVELS)
    p_strides += level * 8
    i_group, i_run = i_part // run, i_part % run
    if LAYOUT == CHANNELS_LAST:
        inner = channel
    else:
        inner = position
    # Products with 8 tell the compiler of 16-byte accesses.
    if (LAYOUT != STRIDED) & (inner % 8 == 0):
        if LAYOUT == CHANNELS_LAST:
            channel = inner // 8 * 8
        else:
            position = inner // 8 * 8
        _sums(
            p_s, p_t, p_strides, p_partial, i_image, i_group, i_run, step, channel, position, width, rate,
            LAYOUT, BLOCK_C, BLOCK_P, DEPTH, GROUP,
        )  # fmt: skip
    else:
        _sums(
            p_s, p_t, p_strides, p_partial, i_image, i_group, i_run, step, channel, position, width, rate,
            LAYOUT, BLOCK_C, BLOCK_P, DEPTH, GROUP,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_images", "rows"])
def channel_kl_finish(
    p_partial,  # [programs, 5, BLOCK_C]
    p_stats,  # [4, R]
    p_out,  # [L, N]
    starts,
    blocks,
    runs,
    channels,
    rows_before,
    n_images,
    rows,
    rate,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LEVELS: tl.constexpr,
):
    i_out = tl.program_id(0)
    level, i_image = i_out // n_images, i_out % n_images
    run, channel = pick_int(runs, level, LEVELS), pick_int(channels, level, LEVELS)
    first = pick_int(starts, level, LEVELS) + i_image * pick_int(blocks, level, LEVELS)
    p_stats += pick_int(rows_before, level, LEVELS) + i_image * channel
    o_r = tl.arange(0, BLOCK_R)[None, :]
    total = tl.zeros([BLOCK_N], tl.float32)
    for begin in range(0, channel, BLOCK_N):
        o_c = begin + tl.arange(0, BLOCK_N)
        i_program = first + (o_c // BLOCK_C)[:, None] * run + o_r
        p = p_partial + i_program.to(tl.int64) * (KINDS * BLOCK_C) + (o_c % BLOCK_C)[:, None]
        m_c = o_c < channel
        m = m_c[:, None] & (o_r < run)
        top_s = tl.load(p, mask=m, other=LOW)
        top_t = tl.load(p + BLOCK_C, mask=m, other=LOW)
        sum_s = tl.load(p + 2 * BLOCK_C, mask=m, other=0.0)
        sum_t = tl.load(p + 3 * BLOCK_C, mask=m, other=0.0)
        expected = tl.load(p + 4 * BLOCK_C, mask=m, other=0.0)
        all_s, all_t = tl.max(top_s, axis=1), tl.max(top_t, axis=1)
        up_s, up_t = top_s - all_s[:, None], top_t - all_t[:, None]
        scale = tl.exp2(up_t * rate)
        expected = tl.sum((expected + _moved(sum_t, up_t, up_s)) * scale, axis=1)
        total_t = tl.sum(sum_t * scale, axis=1)
        total_s = tl.sum(sum_s * tl.exp2(up_s * rate), axis=1)
        # 0 where there is no channel or position.
        total_s, total_t = tl.where(total_s == 0.0, 1.0, total_s), tl.where(total_t == 0.0, 1.0, total_t)
        log_s, log_t = tl.log(total_s), tl.log(total_t)
        b_kl = expected / total_t * (rate * LN2) - log_t + log_s
        # Rounding may leave a divergence of almost nothing below zero; NaN is not below.
        total += tl.where(m_c & (run > 0) & ~(b_kl < 0.0), b_kl, 0.0)
        tl.store(p_stats + o_c, all_s, mask=m_c)
        tl.store(p_stats + rows + o_c, all_t, mask=m_c)
        tl.store(p_stats + 2 * rows + o_c, log_s, mask=m_c)
        tl.store(p_stats + 3 * rows + o_c, log_t, mask=m_c)
    tl.store(p_out + i_out, tl.sum(total))


@triton.jit
def _gradient(
    p_s, p_t, p_o, p_strides, p_stats, i_image, i_group, i_run, steps, channel, position, width, rows, rate, scale,
    LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    p_s += image_offset(i_image, channel, position, p_strides, LAYOUT)
    p_t += image_offset(i_image, channel, position, p_strides + 4, LAYOUT)
    p_o += image_offset(i_image, channel, position, p_strides + 8, LAYOUT)
    o_c = i_group * BLOCK_C + tl.arange(0, BLOCK_C)[None, :, None]
    o_d = tl.arange(0, DEPTH)[:, None, None] * BLOCK_P + tl.arange(0, BLOCK_P)[None, None, :]
    m_c = o_c < channel
    top_s, top_t = tl.load(p_stats + o_c, mask=m_c), tl.load(p_stats + rows + o_c, mask=m_c)
    log_s = tl.load(p_stats + 2 * rows + o_c, mask=m_c) / LN2
    log_t = tl.load(p_stats + 3 * rows + o_c, mask=m_c) / LN2
    for step in range(steps):
        o_p = (i_run * steps + step) * (DEPTH * BLOCK_P) + o_d
        m = m_c & (o_p < position)
        o_s = _offsets(p_strides, o_c, o_p, channel, position, width, LAYOUT)
        o_t = _offsets(p_strides + 4, o_c, o_p, channel, position, width, LAYOUT)
        b_s = tl.load(p_s + o_s, mask=m, other=0.0).to(tl.float32)  # stream
        b_t = tl.load(p_t + o_t, mask=m, other=0.0).to(tl.float32)  # stream
        b_p, b_q = tl.exp2((b_s - top_s) * rate - log_s), tl.exp2((b_t - top_t) * rate - log_t)
        b_g = ((b_p - b_q) * scale).to(p_o.dtype.element_ty)
        o_g = _offsets(p_strides + 8, o_c, o_p, channel, position, width, LAYOUT)
        tl.store(p_o + o_g, b_g, mask=m)  # stream


@triton.jit(do_not_specialize=["n_images", "rows"])
def channel_kl_backward(
    p_grad,  # [L, N]
    p_student,
    p_teacher,
    p_out,
    p_strides,  # [L, 12]
    p_stats,  # [4, R]
    starts,
    blocks,
    runs,
    steps,
    channels,
    positions,
    widths,
    rows_before,
    n_images,
    rows,
    rate,
    LEVELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DEPTH: tl.constexpr,
):
    level, i_image, i_part = locate(starts, blocks, LEVELS)
    run, step = pick_int(runs, level, LEVELS), pick_int(steps, level, LEVELS)
    channel, position = pick_int(channels, level, LEVELS), pick_int(positions, level, LEVELS)
    width = pick_int(widths, level, LEVELS)
    p_s, p_t = pick_pointer(p_student, level, LEVELS), pick_pointer(p_teacher, level, LEVELS)
    p_o = pick_pointer(p_out, level, LEVELS)
    p_strides += level * 12
    p_stats += pick_int(rows_before, level, LEVELS) + i_image * channel
    scale = tl.load(p_grad + level * n_images + i_image) * (rate * LN2)
    i_group, i_run = i_part // run, i_part % run
    if LAYOUT == CHANNELS_LAST:
        inner = channel
    else:
        inner = position
    if (LAYOUT != STRIDED) & (inner % 8 == 0):
        if LAYOUT == CHANNELS_LAST:
            channel = inner // 8 * 8
        else:
            position = inner // 8 * 8
        _gradient(
            p_s, p_t, p_o, p_strides, p_stats, i_image, i_group, i_run, step, channel, position, width, rows,
            rate, scale, LAYOUT, BLOCK_C, BLOCK_P, DEPTH,
        )  # fmt: skip
    else:
        _gradient(
            p_s, p_t, p_o, p_strides, p_stats, i_image, i_group, i_run, step, channel, position, width, rows,
            rate, scale, LAYOUT, BLOCK_C, BLOCK_P, DEPTH,
        )  # fmt: skip
