"""One signed step of a perturbation and its projection, all images in one pass: three values read, one written.

Nothing but single float32 operations, so the results are the reference's, bit for bit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INT32_MAX, check_index_space, empty_like, launch, table
from .rows import float_bits, load_float, load_int, load_pointer, offset_at

OP = "sign_step"
ROWS, COLUMNS, WARPS = 16, 64, 4
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _clamp(b, low, high):
    """A NaN stays one."""
    return tl.where(b < low, low, tl.where(b > high, high, b))


@triton.jit
def _stepped(b_delta, b_direction, b_x, p_channel, moving, m_valid, HAS_DIRECTION: tl.constexpr):
    radius, low, high = load_float(p_channel + 1), load_float(p_channel + 2), load_float(p_channel + 3)
    b = b_delta
    if HAS_DIRECTION:
        step = tl.where(moving, load_float(p_channel), 0.0)
        b = tl.where(b_direction > 0, b + step, tl.where(b_direction < 0, b - step, b))
    b = tl.where(m_valid, _clamp(b, -radius, radius), 0.0)
    x = b_x.to(tl.float32)
    return _clamp(b + x, tl.where(x > low, low, x), tl.where(x < high, high, x)) - x


@triton.jit(do_not_specialize=["n_images", "channels", "height", "width"])
def stepped_deltas(
    p_table,  # [N, 20] and [C, 4]
    p_moves,  # [N]
    n_images,
    channels,
    height,
    width,
    DIRECTION: tl.constexpr,
    IMAGE: tl.constexpr,
    HAS_DIRECTION: tl.constexpr,
    HAS_MOVES: tl.constexpr,
    DENSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_tile = tl.program_id(0)
    i_image = tl.program_id(1)
    p_row = p_table + i_image * 20
    p_delta, p_direction = (
        load_pointer(p_row, tl.float32, UNIT > 1),
        load_pointer(p_row + 1, DIRECTION, UNIT > 1),
    )
    p_image, p_out = load_pointer(p_row + 2, IMAGE, UNIT > 1), load_pointer(p_row + 3, tl.float32, UNIT > 1)
    h, w = load_int(p_row + 16), load_int(p_row + 17)
    moving = True
    if HAS_MOVES:
        moving = tl.load(p_moves + i_image) != 0
    width = width // UNIT * UNIT
    tiles_x = tl.cdiv(width, COLUMNS)
    top, left = (i_tile // tiles_x) * ROWS, (i_tile % tiles_x) * COLUMNS
    y = (top + tl.arange(0, ROWS))[:, None]
    o = tl.arange(0, ROWS * COLUMNS)
    for part in range(channels):
        p_channel = p_table + n_images * 20 + part * 4
        if DENSE:
            if CHANNELS_LAST:
                e = (left * channels + part * COLUMNS + tl.arange(0, COLUMNS))[None, :]
                x, p_channel = e // channels, p_table + n_images * 20 + (e % channels) * 4
                o_tile, m = y * (width * channels) + e, (y < height) & (e < width * channels)
            else:
                x = (left + tl.arange(0, COLUMNS))[None, :]
                o_tile, m = (part * height + y) * width + x, (y < height) & (x < width)
            b_delta = tl.load(p_delta + o_tile, mask=m, other=0.0)  # stream
            b_x = tl.load(p_image + o_tile, mask=m, other=0.0)  # stream
            b_direction = b_delta
            if HAS_DIRECTION:
                b_direction = tl.load(p_direction + o_tile, mask=m, other=0.0).to(tl.float32)  # stream
            m_valid = (y < h) & (x < w)
            b = _stepped(b_delta, b_direction, b_x, p_channel, moving, m_valid, HAS_DIRECTION)
            tl.store(p_out + o_tile, b, mask=m)  # stream
        else:
            y_o, x_o = top + o // COLUMNS, left + o % COLUMNS
            m_o = (y_o < height) & (x_o < width)
            d = tl.load(p_delta + offset_at(part, y_o, x_o, p_row + 4, OFFSET), mask=m_o, other=0.0)
            v = tl.load(p_image + offset_at(part, y_o, x_o, p_row + 10, OFFSET), mask=m_o, other=0.0)
            g = d
            if HAS_DIRECTION:
                g = tl.load(p_direction + offset_at(part, y_o, x_o, p_row + 7, OFFSET), mask=m_o, other=0.0)
            r = _stepped(d, g.to(tl.float32), v, p_channel, moving, (y_o < h) & (x_o < w), HAS_DIRECTION)
            tl.store(p_out + offset_at(part, y_o, x_o, p_row + 13, OFFSET), r, mask=m_o)


def forward(
    delta: Tensor,
    direction: Tensor | None,
    images: Tensor,
    moves: Tensor | None,
    frames: Sequence[Sequence[int]] | None,
    step: Sequence[float],
    radius: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
) -> Tensor:
    """The new perturbation; see the reference."""
    n, channels, height, width = delta.shape
    check_index_space(OP, "delta[0]", channels * height * width)
    out = empty_like(delta)
    used = delta if direction is None else direction
    tensors = (delta, used, images, out)
    unit = 16 // min(x.element_size() for x in tensors)
    strides = [s for x in tensors for s in x.stride()[1:]]
    farthest = max(
        sum((k - 1) * s for k, s in zip(delta.shape[1:], x.stride()[1:], strict=True)) for x in tensors
    )
    if width % unit or any(x.data_ptr() % 16 or (n > 1 and x.stride(0) % unit) for x in tensors):
        unit = 1
    planar = all(x[:1].is_contiguous() for x in tensors)
    last = not planar and all(x[:1].is_contiguous(memory_format=torch.channels_last) for x in tensors)
    numbers: list[int] = []
    for i in range(n):
        numbers += [x.data_ptr() + i * x.stride(0) * x.element_size() for x in tensors]
        numbers += [*strides, *(frames[i] if frames else (height, width)), 0, 0]
    for row in zip(step, radius, low, high, strict=True):
        numbers += [float_bits(v) for v in row]
    host = table(numbers, torch.int64, delta.device)
    dense = planar or last
    launch(
        stepped_deltas,
        (triton.cdiv(height, ROWS) * triton.cdiv(width, COLUMNS), n),
        delta.device,
        host,
        host if moves is None else moves.view(torch.uint8),
        n,
        channels,
        height,
        width,
        DIRECTION=TYPES[used.dtype],
        IMAGE=TYPES[images.dtype],
        HAS_DIRECTION=direction is not None,
        HAS_MOVES=moves is not None,
        DENSE=dense,
        CHANNELS_LAST=last,
        UNIT=unit if dense else 1,
        OFFSET=tl.int32 if farthest <= INT32_MAX else tl.int64,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )
    return out
