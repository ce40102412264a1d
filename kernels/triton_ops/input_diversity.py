"""Images shrunk into a window of their own frame, and the adjoint of that: one launch each way.

A program makes one tile of one image. Bilinear weights are quotients of integers, so both directions have the same ones.
The adjoint gathers: as no side is enlarged, an input pixel is read by two output pixels of a row and two of a column at
most, so four loads make a value in either direction, and nothing is added atomically.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INT32_MAX, check_index_space, empty_like, launch, table
from .rows import copy_tile, load_int, load_pointer, offset_at

OP = "input_diversity"
ROWS, COLUMNS, WARPS = 8, 128, 4
ENTRIES = 20
MAX_SIDE = 32767  # products of two sides, doubled, fit 32 bits
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _taps(o, start, length, frame, ADJOINT: tl.constexpr):
    """First of the two neighbours that make position ``o`` of one side, and both weights, 0 where there is none.

    Output k of the ``length`` ones lies at ((2 k + 1) frame - length) / (2 length) of the ``frame`` inputs.
    """
    whole = 2 * length
    if ADJOINT:
        k = (length * (2 * o - 1) + frame) // (2 * frame)
        beyond = (2 * k + 1) * frame - length - whole * o
        a = tl.where(k < length, whole - tl.abs(beyond), 0)
        b = tl.where(k + 1 < length, whole - tl.abs(beyond + 2 * frame), 0)
        first = start + k
    else:
        position = (2 * (o - start) + 1) * frame - length
        first = position // whole
        b = position - first * whole
        a = whole - b
    size = whole.to(tl.float32)
    weight_a = tl.div_rn(tl.maximum(a, 0).to(tl.float32), size)
    return first, weight_a, tl.div_rn(tl.maximum(b, 0).to(tl.float32), size)


@triton.jit
def _blend(p, stride_h, stride_w, ya, yb, xa, xb, m):
    """The weighted sum of four neighbours; those of weight 0 are not read."""
    m_a, m_b = m & (ya > 0), m & (yb > 0)
    top = xa * tl.load(p, mask=m_a & (xa > 0), other=0.0).to(tl.float32)
    top += xb * tl.load(p + stride_w, mask=m_a & (xb > 0), other=0.0).to(tl.float32)
    low = xa * tl.load(p + stride_h, mask=m_b & (xa > 0), other=0.0).to(tl.float32)
    low += xb * tl.load(p + stride_h + stride_w, mask=m_b & (xb > 0), other=0.0).to(tl.float32)
    return ya * top + yb * low


@triton.jit(do_not_specialize=["channels", "height", "width"])
def shrunken_images(
    p_table,  # [N, 20]
    p_fill,  # [C], or [1] with FILL = 0
    channels,
    height,
    width,
    DTYPE: tl.constexpr,
    ADJOINT: tl.constexpr,
    FILL: tl.constexpr,
    DENSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_tile = tl.program_id(0)
    p_row = p_table + tl.program_id(1) * 20
    p_in, p_out = load_pointer(p_row, DTYPE, UNIT > 1), load_pointer(p_row + 2, DTYPE, UNIT > 1)
    h, w, x0, y0 = load_int(p_row + 12), load_int(p_row + 13), load_int(p_row + 14), load_int(p_row + 15)
    w_out, h_out = load_int(p_row + 16), load_int(p_row + 17)
    width = width // UNIT * UNIT
    tiles_x = tl.cdiv(width, COLUMNS)
    top, left = (i_tile // tiles_x) * ROWS, (i_tile % tiles_x) * COLUMNS
    untouched = (w_out == w) & (h_out == h)
    if untouched | (top >= h) | (left >= w):
        copy_tile(
            p_in, p_out, p_row, top, left, height, width, channels, DENSE, CHANNELS_LAST, OFFSET, 3, ROWS, COLUMNS
        )  # fmt: skip
    else:
        # Loads are one-dimensional, so that neighbouring threads take neighbouring pixels; wide stores are not.
        o = tl.arange(0, ROWS * COLUMNS)
        y = top + o // COLUMNS
        y_first, ya, yb = _taps(y, y0, h_out, h, ADJOINT)
        x = left + o % COLUMNS
        x_first, xa, xb = _taps(x, x0, w_out, w, ADJOINT)
        stride_h, stride_w = tl.load(p_row + 4).to(OFFSET), tl.load(p_row + 5).to(OFFSET)
        y_tile = (top + tl.arange(0, ROWS))[:, None]
        for part in range(channels):
            if DENSE and CHANNELS_LAST:
                e = left * channels + part * COLUMNS + o % COLUMNS
                c, x = e % channels, e // channels
                x_first, xa, xb = _taps(x, x0, w_out, w, ADJOINT)
            else:
                c = part
            m, m_frame = (y < height) & (x < width), (y < h) & (x < w)
            m_tap = m_frame
            if not ADJOINT:
                m_tap = (y >= y0) & (y < y0 + h_out) & (x >= x0) & (x < x0 + w_out)
            p = p_in + offset_at(c, y_first, x_first, p_row + 3, OFFSET)
            b = _blend(p, stride_h, stride_w, ya, yb, xa, xb, m_tap)
            if not ADJOINT:
                b = tl.where(m_tap, b, tl.load(p_fill + c * FILL))
            b_as_is = tl.load(
                p_in + offset_at(c, y, x, p_row + 3, OFFSET), mask=m & (m_frame == 0), other=0.0
            )
            b = tl.where(m_frame, b.to(DTYPE), b_as_is)
            if DENSE and CHANNELS_LAST:
                e_tile = (left * channels + part * COLUMNS + tl.arange(0, COLUMNS))[None, :]
                m_tile = (y_tile < height) & (e_tile < width * channels)
                p_tile = p_out + y_tile * (width * channels) + e_tile
                tl.store(p_tile, tl.reshape(b, [ROWS, COLUMNS]), mask=m_tile)  # stream
            elif DENSE:
                x_tile = (left + tl.arange(0, COLUMNS))[None, :]
                m_tile = (y_tile < height) & (x_tile < width)
                p_tile = p_out + (part * height + y_tile) * width + x_tile
                tl.store(p_tile, tl.reshape(b, [ROWS, COLUMNS]), mask=m_tile)  # stream
            else:
                tl.store(p_out + offset_at(c, y, x, p_row + 9, OFFSET), b, mask=m)


def _run(images: Tensor, frames: Sequence, windows: Sequence, fill: Tensor, adjoint: bool) -> Tensor:
    n, channels, height, width = images.shape
    check_index_space(OP, "images[0]", channels * height * width)
    if max(height, width) > MAX_SIDE:
        raise ValueError(
            f"{OP}: expected sides of at most {MAX_SIDE} with Triton, got {height}x{width}; write backend='reference'"
        )
    out = empty_like(images)
    unit = 16 // images.element_size()
    strides = (images.stride(), out.stride())
    farthest = max(
        sum((k - 1) * s for k, s in zip(images.shape[1:], row[1:], strict=True)) for row in strides
    )
    if width % unit or any(x.data_ptr() % 16 or (n > 1 and x.stride(0) % unit) for x in (images, out)):
        unit = 1
    planar = all(x[:1].is_contiguous() for x in (images, out))
    last = not planar and all(x[:1].is_contiguous(memory_format=torch.channels_last) for x in (images, out))
    addresses = [[x.data_ptr() + i * x.stride(0) * x.element_size() for x in (images, out)] for i in range(n)]
    rows = [
        (a, 0, b, *strides[0][1:], 0, 0, 0, *strides[1][1:], *frame, *window, 0, 0)
        for (a, b), frame, window in zip(addresses, frames, windows, strict=True)
    ]
    dense = planar or last
    launch(
        shrunken_images,
        (triton.cdiv(height, ROWS) * triton.cdiv(width, COLUMNS), n),
        images.device,
        table(rows, torch.int64, images.device),
        fill,
        channels,
        height,
        width,
        DTYPE=TYPES[images.dtype],
        ADJOINT=adjoint,
        FILL=int(fill.numel() > 1),
        DENSE=dense,
        CHANNELS_LAST=last,
        UNIT=unit if dense else 1,
        OFFSET=tl.int32 if farthest <= INT32_MAX else tl.int64,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )
    return out


def forward(images: Tensor, frames: Sequence, windows: Sequence, fill: Tensor) -> Tensor:
    """``[N, C, H, W]``, see the operation; ``fill``: float32 ``[C]`` or ``[1]``."""
    return _run(images, frames, windows, fill.contiguous(), False)


def backward(grad: Tensor, frames: Sequence, windows: Sequence) -> Tensor:
    """The gradient of the images, with the strides of ``grad``."""
    return _run(grad, frames, windows, grad, True)
