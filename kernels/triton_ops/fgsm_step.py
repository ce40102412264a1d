"""A signed gradient step of a batch of packed perturbations: one launch.

A program makes whole bytes, a tile of rows and bytes of one channel of one record. Gradients are gathered, neighbouring
threads taking neighbouring cells, since spans begin anywhere: these accesses are narrow. Bytes are counted in one dimension,
so that a thread takes 8 of a row where rows start on multiples of 16.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INT32_MAX, check_index_space, empty_like, launch, table, upload
from .rows import load_int, load_pointer

OP = "fgsm_step_packed"
ROWS, BYTES = 32, 32
WARPS = {2: 8, 4: 4, 8: 4}  # of bits: 16 sums a thread at most


@triton.jit
def _whole_levels(step, levels, inverse):
    """A step to the nearest whole number of levels, halves away from 0; NaN is none."""
    size = tl.abs(step) * inverse + 0.5
    size = tl.where(size >= 1.0, tl.where(size > levels, levels.to(tl.float32), size), 0.0).to(tl.int32)
    return tl.where(step < 0, -size, size)


@triton.jit(
    do_not_specialize=["channels", "levels", "inverse", "stride_n", "stride_c", "stride_h", "stride_w"]
)
def fgsm_step_forward(
    p_gradient,
    p_step,  # [N]
    p_table,  # [N, 16]
    p_spans,  # x_span and y_span of every image
    channels,
    levels,
    inverse,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    PER: tl.constexpr = 8 // BITS
    i_tile, c = tl.program_id(0) // channels, tl.program_id(0) % channels
    i_image = tl.program_id(1).to(tl.int64)
    p_row = p_table + i_image * 16
    p_in, p_out = load_pointer(p_row, tl.uint8, UNIT > 1), load_pointer(p_row + 1, tl.uint8, UNIT > 1)
    cells_y, cells_x = load_int(p_row + 2), load_int(p_row + 3)
    pitch = load_int(p_row + 4) // UNIT * UNIT
    p_x_span, p_y_span = p_spans + load_int(p_row + 5), p_spans + load_int(p_row + 6)
    tiles_x = tl.cdiv(pitch, BYTES)
    top, left = (i_tile // tiles_x) * ROWS, (i_tile % tiles_x) * BYTES
    if top >= cells_y:
        return
    move = _whole_levels(tl.load(p_step + i_image), levels, inverse)
    # An image that does not move is not read.
    most_y, most_x = tl.where(move == 0, 0, load_int(p_row + 7)), load_int(p_row + 8)
    p_gradient += i_image * stride_n + c.to(tl.int64) * stride_c
    y, x = top + tl.arange(0, ROWS), left * PER + tl.arange(0, BYTES * PER)
    y_start = tl.load(p_y_span + 2 * y, mask=y < cells_y, other=0)
    y_stop = tl.load(p_y_span + 2 * y + 1, mask=y < cells_y, other=0)
    x_start = tl.load(p_x_span + 2 * x, mask=x < cells_x, other=0)
    x_stop = tl.load(p_x_span + 2 * x + 1, mask=x < cells_x, other=0)
    total = tl.zeros([ROWS, BYTES * PER], tl.float32)
    for i in range(most_y):
        for j in range(most_x):
            p_pixel = p_gradient + (
                (y_start + i).to(OFFSET)[:, None] * stride_h + (x_start + j).to(OFFSET)[None, :] * stride_w
            )
            m = (y_start + i < y_stop)[:, None] & (x_start + j < x_stop)[None, :]
            total += tl.load(p_pixel, mask=m, other=0).to(tl.float32)
    sign = (total > 0).to(tl.int8) - (total < 0).to(tl.int8)

    o = tl.arange(0, ROWS * BYTES)
    row, byte = top + o // BYTES, left + o % BYTES
    o_byte = (c * cells_y + row) * pitch + byte
    m_byte = (row < cells_y) & (byte < pitch)
    b = tl.load(p_in + o_byte, mask=m_byte, other=0)
    shift = (tl.arange(0, PER) * BITS)[None, :]
    code = (b.to(tl.int32)[:, None] >> shift) & (2**BITS - 1)
    change = tl.reshape(sign, [ROWS * BYTES, PER]).to(tl.int32) * move
    code = tl.where(change == 0, code, tl.minimum(tl.maximum(code + change, 0), levels - 1))
    b_out = tl.sum(code << shift, axis=1).to(tl.uint8)
    tl.store(p_out + o_byte, b_out, mask=m_byte)


def forward(
    gradient: Tensor,
    records: Sequence[Tensor],
    cells: Sequence[int],
    x_span: Sequence[Tensor],
    y_span: Sequence[Tensor],
    bits: int,
    levels: int,
    spacing: float,
    step: Tensor,
) -> list[Tensor]:
    """New records; see the reference."""
    device, channels = gradient.device, gradient.shape[1]
    check_index_space(OP, "an image of the gradient", gradient[:1].numel())
    for i, record in enumerate(records):
        check_index_space(OP, f"records[{i}]", record.numel(), chunk=ROWS * BYTES)
    out = [empty_like(record) for record in records]
    if not records or not channels:
        return out
    rows, start, unit, tiles = [], 0, 16, 0
    for i, (record, new) in enumerate(zip(records, out, strict=True)):
        height, width = cells[2 * i], cells[2 * i + 1]
        pitch = record.numel() // (channels * height)
        if pitch % 16 or record.data_ptr() % 16 or new.data_ptr() % 16:
            unit = 1
        most_x, most_y = (int((span[i][:, 1] - span[i][:, 0]).max()) for span in (x_span, y_span))
        rows.append(
            (
                record.data_ptr(),
                new.data_ptr(),
                height,
                width,
                pitch,
                start,
                start + 2 * width,
                most_y,
                most_x,
            )
            + (0,) * 7
        )
        start += 2 * (width + height)
        tiles = max(tiles, triton.cdiv(pitch, BYTES) * triton.cdiv(height, ROWS))
    check_index_space(OP, "all maps together", start)
    farthest = sum((s - 1) * k for s, k in zip(gradient.shape[1:], gradient.stride()[1:], strict=True))
    spans = torch.cat([part.reshape(-1) for pair in zip(x_span, y_span, strict=True) for part in pair])
    launch(
        fgsm_step_forward,
        (tiles * channels, len(records)),
        device,
        gradient,
        step,
        table(rows, torch.int64, device),
        upload(spans, device),
        channels,
        levels,
        1.0 / spacing,
        *gradient.stride(),
        BITS=bits,
        UNIT=unit,
        OFFSET=tl.int32 if farthest <= INT32_MAX else tl.int64,
        ROWS=ROWS,
        BYTES=BYTES,
        num_warps=WARPS[bits],
        enable_fp_fusion=False,  # the step in whole levels is then that of the reference
    )
    return out
