"""What the kernels of focal and global distillation share: where a program works, and addresses of its tile."""

import triton
import triton.language as tl

# Layouts of a pyramid: positions innermost, channels innermost, or by a table of strides.
CONTIGUOUS, CHANNELS_LAST, STRIDED = (tl.constexpr(i) for i in range(3))


@triton.jit
def locate(
    channels,
    heights,
    widths,
    groups,
    BLOCK_P: tl.constexpr,
    LEVELS: tl.constexpr,
    PART_C: tl.constexpr,
    PER_C: tl.constexpr,
    PART_P: tl.constexpr,
    PER_P: tl.constexpr,
):
    """Level, group and part of this program, that level's C, H, W, and sums of C, H W, blocks and blocks C of the
    levels before it.

    Every level has ``groups`` groups of PER_C ceil(C / PART_C) + PER_P ceil(H W / PART_P) parts, or of one part.
    """
    i_program = tl.program_id(0)
    zero = i_program * 0
    level, first, per_group, channel, height, width = zero, zero, zero + 1, zero, zero, zero
    channels_before, positions_before, blocks_before, rows_before = zero, zero, zero, zero
    start, all_channels, all_positions, all_blocks, all_rows = zero, zero, zero, zero, zero
    for i in tl.static_range(LEVELS):
        c = (channels[i] - 3) >> 1
        h = (heights[i] - 3) >> 1
        w = (widths[i] - 3) >> 1
        position = h * w
        blocks = (position + BLOCK_P - 1) // BLOCK_P
        parts = PER_C * ((c + PART_C - 1) // PART_C) + PER_P * ((position + PART_P - 1) // PART_P)
        if PER_C + PER_P == 0:
            parts += 1
        if (i_program >= start) & (i_program < start + parts * groups):
            level, first, per_group, channel, height, width = zero + i, start, parts, c, h, w
            channels_before, positions_before = all_channels, all_positions
            blocks_before, rows_before = all_blocks, all_rows
        start += parts * groups
        all_channels += c
        all_positions += position
        all_blocks += blocks
        all_rows += blocks * c
    i_group = (i_program - first) // per_group
    i_part = (i_program - first) % per_group
    return (
        level,
        i_group,
        i_part,
        channel,
        height,
        width,
        channels_before,
        positions_before,
        blocks_before,
        rows_before,
    )


@triton.jit
def image_offset(i_image, channel, position, p_strides, LAYOUT: tl.constexpr):
    if LAYOUT == STRIDED:
        o = i_image.to(tl.int64) * tl.load(p_strides)
    else:
        o = i_image.to(tl.int64) * (channel * position)
    return o


@triton.jit
def tile_offsets(o_c, o_p, channel, position, width, p_strides, LAYOUT: tl.constexpr):
    """``[C, P]`` addresses within an image."""
    if LAYOUT == CONTIGUOUS:
        o = o_c[:, None] * position + o_p[None, :]
    elif LAYOUT == CHANNELS_LAST:
        o = o_p[None, :] * channel + o_c[:, None]
    else:
        o_row = (o_p // width).to(tl.int64) * tl.load(p_strides + 2)
        o_column = (o_p % width).to(tl.int64) * tl.load(p_strides + 3)
        o = (o_c.to(tl.int64) * tl.load(p_strides + 1))[:, None] + (o_row + o_column)[None, :]
    return o


@triton.jit
def four(a, b, c, d):
    """``[..., 2, 2]``: four tensors, reduced together at the price of one."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def softmax_total(p_top, p_sum, count, BLOCK: tl.constexpr):
    """The maximum over blocks, and the sum of exponentials relative to it."""
    b_top = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in range(0, count, BLOCK):
        o = begin + tl.arange(0, BLOCK)
        b_top = tl.maximum(b_top, tl.load(p_top + o, mask=o < count, other=float("-inf")))
    top = tl.max(b_top)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, count, BLOCK):
        o = begin + tl.arange(0, BLOCK)
        scale = tl.exp(tl.load(p_top + o, mask=o < count, other=float("-inf")) - top)
        b_sum += tl.load(p_sum + o, mask=o < count, other=0.0) * scale
    return top, tl.sum(b_sum)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
