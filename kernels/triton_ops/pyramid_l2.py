"""Sums of squared or absolute differences of two pyramids: two launches forward, one backward.

Forward: every program sums a chunk of one image of one level into a partial; a second launch adds the
partials, so that no float is added atomically and a repeat gives the same bits. Backward: one elementwise pass.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import empty, empty_like, launch
from .levels import fixed, locate, pick_int, pick_pointer
from .pyramid import ALIGN, Grid, grid_of, strides_table

OP = "pyramid_l2"
BLOCK, STEPS = 2048, 8
FINISH_BLOCK = 1024


@triton.jit
def _offset(o, i_image, p_strides, width, positions):
    """Address of element ``o`` (in C, H, W order) of an image through its four strides."""
    i_channel = o // positions
    row = (o % positions) // width
    column = (o % positions) % width
    return (
        i_image.to(tl.int64) * tl.load(p_strides)
        + i_channel.to(tl.int64) * tl.load(p_strides + 1)
        + row.to(tl.int64) * tl.load(p_strides + 2)
        + column.to(tl.int64) * tl.load(p_strides + 3)
    )


@triton.jit
def _difference(p_s, p_t, base, o, m, i_image, p_row, width, positions, FLAT: tl.constexpr):
    """S - T at elements ``o`` of an image, float32."""
    if FLAT:
        b_s = tl.load(p_s + base + o, mask=m, other=0.0)  # stream
        b_t = tl.load(p_t + base + o, mask=m, other=0.0)  # stream
    else:
        b_s = tl.load(p_s + _offset(o, i_image, p_row, width, positions), mask=m, other=0.0)
        b_t = tl.load(p_t + _offset(o, i_image, p_row + 4, width, positions), mask=m, other=0.0)
    return b_s.to(tl.float32) - b_t.to(tl.float32)


@triton.jit
def _valid(p_valid, o, m, i_image, positions, channels, CHANNELS_LAST: tl.constexpr):
    """1 where the element's position is valid."""
    if CHANNELS_LAST:
        position = o // channels
    else:
        position = o % positions
    return tl.load(p_valid + i_image.to(tl.int64) * positions + position, mask=m, other=0) != 0


@triton.jit
def pyramid_distance_forward(
    p_student,
    p_teacher,
    p_valid,
    p_strides,  # [L, 8]
    p_partial,  # [programs]
    starts,
    blocks,
    sizes,
    positions,
    channels,
    widths,
    LEVELS: tl.constexpr,
    SQUARE: tl.constexpr,
    FLAT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    level, i_image, i_chunk = locate(starts, blocks, LEVELS)
    size = pick_int(sizes, level, LEVELS)
    position = pick_int(positions, level, LEVELS)
    channel = pick_int(channels, level, LEVELS)
    p_s = pick_pointer(p_student, level, LEVELS)
    p_t = pick_pointer(p_teacher, level, LEVELS)
    if ALIGNED:
        size = size // 8 * 8
    base = i_image.to(tl.int64) * size
    width, p_row = pick_int(widths, level, LEVELS), p_strides + level * 8
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        o = (i_chunk * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        m = o < size
        b_d = _difference(p_s, p_t, base, o, m, i_image, p_row, width, position, FLAT)
        if SQUARE:
            b_e = b_d * b_d
        else:
            b_e = tl.abs(b_d)
        if HAS_VALID:
            p_v = pick_pointer(p_valid, level, LEVELS)
            b_e = tl.where(_valid(p_v, o, m, i_image, position, channel, CHANNELS_LAST), b_e, 0.0)
        total += b_e
    tl.store(p_partial + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=["n_images"])
def pyramid_distance_finish(
    p_partial,  # [programs]
    p_out,  # [L, N]
    starts,
    blocks,
    n_images,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_out = tl.program_id(0)
    level = i_out // n_images
    start = pick_int(starts, level, LEVELS)
    count = pick_int(blocks, level, LEVELS)
    first = start + (i_out % n_images) * count
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, count, BLOCK):
        o = begin + tl.arange(0, BLOCK)
        total += tl.load(p_partial + first + o, mask=o < count, other=0.0)
    tl.store(p_out + i_out, tl.sum(total))


@triton.jit(do_not_specialize=["n_images"])
def pyramid_distance_backward(
    p_grad,  # [L, N]
    p_student,
    p_teacher,
    p_valid,
    p_strides,  # [L, 12]
    p_out,
    starts,
    blocks,
    sizes,
    positions,
    channels,
    widths,
    n_images,
    LEVELS: tl.constexpr,
    SQUARE: tl.constexpr,
    FLAT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    level, i_image, i_chunk = locate(starts, blocks, LEVELS)
    size = pick_int(sizes, level, LEVELS)
    position = pick_int(positions, level, LEVELS)
    channel = pick_int(channels, level, LEVELS)
    p_s = pick_pointer(p_student, level, LEVELS)
    p_t = pick_pointer(p_teacher, level, LEVELS)
    p_o = pick_pointer(p_out, level, LEVELS)
    if ALIGNED:
        size = size // 8 * 8
    base = i_image.to(tl.int64) * size
    width, p_row = pick_int(widths, level, LEVELS), p_strides + level * 12
    grad = tl.load(p_grad + level * n_images + i_image)
    for step in range(STEPS):
        o = (i_chunk * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        m = o < size
        b_d = _difference(p_s, p_t, base, o, m, i_image, p_row, width, position, FLAT)
        if SQUARE:
            b_g = 2.0 * grad * b_d
        else:
            b_g = tl.where(b_d > 0, grad, tl.where(b_d < 0, -grad, 0.0))
        if HAS_VALID:
            p_v = pick_pointer(p_valid, level, LEVELS)
            b_g = tl.where(_valid(p_v, o, m, i_image, position, channel, CHANNELS_LAST), b_g, 0.0)
        b_g = b_g.to(p_o.dtype.element_ty)
        if FLAT:
            tl.store(p_o + base + o, b_g, mask=m)  # stream
        else:
            tl.store(p_o + _offset(o, i_image, p_row + 8, width, position), b_g, mask=m)


def _layout(pyramids: Sequence[Sequence[Tensor]]) -> tuple[bool, bool]:
    """(all maps of one dense layout, which is channels_last)."""
    maps = [x for maps in pyramids for x in maps]
    if all(x.is_contiguous() for x in maps):
        return True, False
    last = all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)
    return last, last


def _plan(
    student: Sequence[Tensor], pyramids: Sequence[Sequence[Tensor]], valid: Sequence[Tensor]
) -> tuple[Grid, tuple, dict]:
    """The grid, the size arguments and the compile-time options that both directions share."""
    sizes = tuple(math.prod(x.shape[1:]) for x in student)
    grid = grid_of(OP, sizes, student[0].shape[0], BLOCK * STEPS)
    flat, channels_last = _layout(pyramids)
    positions = tuple(x.shape[2] * x.shape[3] for x in student)
    channels, widths = tuple(x.shape[1] for x in student), tuple(x.shape[3] for x in student)
    options = dict(
        LEVELS=len(student),
        FLAT=flat,
        CHANNELS_LAST=channels_last,
        ALIGNED=all(size % ALIGN == 0 for size in sizes),
        HAS_VALID=bool(valid),
        BLOCK=BLOCK,
        STEPS=STEPS,
        num_warps=8,
    )
    shape = (grid.starts[:-1], grid.blocks, sizes, positions, channels, widths)
    return grid, tuple(fixed(values) for values in shape), options


def _dense(valid: Sequence[Tensor], student: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The masks as contiguous bytes; any pointer where there are none."""
    return tuple(v.contiguous().view(torch.uint8) for v in valid) if valid else tuple(student)


def forward(
    student: Sequence[Tensor], teacher: Sequence[Tensor], valid: Sequence[Tensor], square: bool
) -> Tensor:
    """float32 ``[L, N]``; see the reference."""
    device, n = student[0].device, student[0].shape[0]
    out = empty((len(student), n), torch.float32, device)
    grid, sizes, options = _plan(student, (student, teacher), valid)
    if out.numel() and not grid.programs:
        return out.zero_()
    partial = empty(grid.programs, torch.float32, device)
    strides = partial if options["FLAT"] else strides_table(student, teacher)
    launch(
        pyramid_distance_forward,
        grid.programs,
        device,
        tuple(student),
        tuple(teacher),
        _dense(valid, student),
        strides,
        partial,
        *sizes,
        SQUARE=square,
        **options,
    )
    launch(
        pyramid_distance_finish,
        out.numel(),
        device,
        partial,
        out,
        fixed(grid.starts[:-1]),
        fixed(grid.blocks),
        n,
        LEVELS=len(student),
        BLOCK=FINISH_BLOCK,
        num_warps=4,
    )
    return out


def backward(
    grad: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor], valid: Sequence[Tensor], square: bool
) -> list[Tensor]:
    """The gradient of every student map, in its dtype and layout."""
    device = student[0].device
    out = [empty_like(x) for x in student]
    grid, sizes, options = _plan(student, (student, teacher, out), valid)
    strides = grad if options["FLAT"] else strides_table(student, teacher, out)
    launch(
        pyramid_distance_backward,
        grid.programs,
        device,
        grad.contiguous(),
        tuple(student),
        tuple(teacher),
        _dense(valid, student),
        strides,
        tuple(out),
        *sizes,
        student[0].shape[0],
        SQUARE=square,
        **options,
    )
    return out
