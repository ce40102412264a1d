"""Packed perturbations unpacked, mapped and added to a batch of images: one launch.

A program makes one tile of rows and columns of one image: channel by channel, or, with channels innermost, of a row of
values. Images and output move 16 bytes at a time; a cell is gathered by the byte that holds it, which neighbours share.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .augment_batch import _scaled
from .launch import check_index_space, empty, empty_like, launch, table, upload
from .rows import float_bits, load_float, load_int, load_pointer

OP = "apply_delta"
ROWS, COLUMNS, WARPS = 16, 64, 4
CONSTANTS = 6  # of a channel: grey level, low, high, mean, std, 1 / std


@triton.jit
def _value(p_record, c, y_cell, x_cell, inside, cells_y, pitch, half, spacing, BITS: tl.constexpr):
    """Grey levels of the cells of a tile."""
    x = tl.maximum(x_cell, 0)
    byte = tl.load(p_record + ((c * cells_y + y_cell) * pitch + x // (8 // BITS)), mask=inside, other=0)
    code = (byte.to(tl.int32) >> ((x % (8 // BITS)) * BITS)) & (2**BITS - 1)
    return (code - half).to(tl.float32) * spacing


@triton.jit
def _perturbed(b, value, inside, p_channel):
    """Float images: the sum, clamped to the valid range or to where the image is itself; NaN stays."""
    x = b.to(tl.float32)
    low, high = load_float(p_channel + 1), load_float(p_channel + 2)
    low, high = tl.where(x < low, x, low), tl.where(x > high, x, high)
    total = x + load_float(p_channel) * value
    total = tl.where(total < low, low, tl.where(total > high, high, total))
    return tl.where(inside, total.to(b.dtype), b)


@triton.jit
def _normalized(x, inside, p_channel, NORMALIZE: tl.constexpr, DTYPE: tl.constexpr):
    """uint8 images: 0 where there is no cell."""
    if NORMALIZE:
        x = _scaled(x, load_float(p_channel + 3), load_float(p_channel + 4), load_float(p_channel + 5))
    return tl.where(inside, x, 0.0).to(DTYPE)


@triton.jit(do_not_specialize=["channels", "height", "width", "tiles_x", "half", "spacing"])
def apply_delta_forward(
    p_images,
    p_out,
    p_clean,
    p_table,  # [N, 8]
    p_numbers,  # [C, 6], then x_cell and y_cell of every image
    channels,
    height,
    width,
    tiles_x,
    half,
    spacing,
    BITS: tl.constexpr,
    PIXELS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CLEAN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_tile = tl.program_id(0)
    i_image = tl.program_id(1).to(tl.int64)
    p_row = p_table + i_image * 8
    p_record = load_pointer(p_row, tl.uint8, False)
    cells_y, pitch = load_int(p_row + 1), load_int(p_row + 2)
    p_x_cell, p_y_cell = p_numbers + load_int(p_row + 3), p_numbers + load_int(p_row + 4)
    width = width // UNIT * UNIT
    p_images += i_image * channels * height * width
    p_out += i_image * channels * height * width
    p_clean += i_image * channels * height * width
    y = ((i_tile // tiles_x) * ROWS + tl.arange(0, ROWS))[:, None]
    column = ((i_tile % tiles_x) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    y_cell = tl.load(p_y_cell + y, mask=y < height, other=-1)
    if CHANNELS_LAST:
        x, rounds, pitch_out = column // channels, 1, width * channels
    else:
        x, rounds, pitch_out = column, channels, width
    x_cell = tl.load(p_x_cell + x, mask=x < width, other=-1)
    m = (y < height) & (column < pitch_out)
    inside = (y_cell >= 0) & (x_cell >= 0)
    for i in range(rounds):
        c = column % channels if CHANNELS_LAST else i
        o = (i * height + y) * pitch_out + column
        p_channel = p_numbers + c * 6
        value = _value(p_record, c, y_cell, x_cell, inside, cells_y, pitch, half, spacing, BITS)
        if PIXELS:
            b_pixels = tl.load(p_images + o, mask=m, other=0).to(tl.float32)
            total = tl.minimum(tl.maximum(b_pixels + value, 0.0), 255.0)
            b_out = _normalized(total, inside, p_channel, NORMALIZE, p_out.dtype.element_ty)
            if CLEAN:
                b_clean = _normalized(b_pixels, inside, p_channel, NORMALIZE, p_out.dtype.element_ty)
                tl.store(p_clean + o, b_clean, mask=m)  # stream
        else:
            b = tl.load(p_images + o, mask=m, other=0)  # stream
            b_out = _perturbed(b, value, inside, p_channel)
        tl.store(p_out + o, b_out, mask=m)  # stream


def forward(
    images: Tensor,
    records: Sequence[Tensor],
    cells: Sequence[int],
    x_cell: Sequence[Tensor],
    y_cell: Sequence[Tensor],
    bits: int,
    levels: int,
    spacing: float,
    grey_level: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    clean: bool,
) -> tuple[Tensor, Tensor]:
    """(perturbed, clean or empty) of contiguous or channels_last images; see the reference."""
    device = images.device
    n, channels, height, width = images.shape
    check_index_space(OP, "an image", images[:1].numel(), chunk=ROWS * COLUMNS)
    out = empty_like(images, dtype)
    plain = empty_like(out) if clean else empty(0, dtype, device)
    if not n:
        return out, plain
    zeros = [0.0] * channels
    numbers = [
        grey_level or zeros,
        low or zeros,
        high or zeros,
        mean or zeros,
        std or zeros,
        [1 / s for s in std] or zeros,
    ]
    constants = [float_bits(v) for channel in zip(*numbers, strict=True) for v in channel]
    tables, rows, start = [torch.tensor(constants, dtype=torch.int32, device="cpu")], [], len(constants)
    for i, record in enumerate(records):
        check_index_space(OP, f"records[{i}]", record.numel())
        pitch = record.numel() // (channels * cells[2 * i])
        rows.append((record.data_ptr(), cells[2 * i], pitch, start, start + width, 0, 0, 0))
        tables += x_cell[i], y_cell[i]
        start += width + height
    check_index_space(OP, "all maps together", start)
    last = not images.is_contiguous()
    tiles_x = triton.cdiv(width * (channels if last else 1), COLUMNS)
    launch(
        apply_delta_forward,
        (tiles_x * triton.cdiv(height, ROWS), n),
        device,
        images,
        out,
        plain if clean else out,
        table(rows, torch.int64, device),
        upload(torch.cat(tables), device),
        channels,
        height,
        width,
        tiles_x,
        levels // 2,
        float(spacing),
        BITS=bits,
        PIXELS=not images.dtype.is_floating_point,
        NORMALIZE=bool(mean),
        CLEAN=clean,
        CHANNELS_LAST=last,
        UNIT=8 if width % 8 == 0 else 1,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
        enable_fp_fusion=False,  # the sums are then those of the reference
    )
    return out, plain
