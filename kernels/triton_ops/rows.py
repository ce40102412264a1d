"""One row of numbers an image: addresses, strides, sizes, strengths and keys of a ragged batch in an int64 table."""

import struct

import triton
import triton.language as tl


def float_bits(value: float) -> int:
    """The bits of a float32 as an integer, for :func:`load_float`."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


@triton.jit
def load_int(p_entry):
    """A number that fits 32 bits."""
    return tl.load(p_entry).to(tl.int32)


@triton.jit
def load_float(p_entry):
    """A float32 stored as its bits."""
    return tl.load(p_entry).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def load_pointer(p_entry, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address as a pointer; ``ALIGNED``: it is a multiple of 16."""
    pointer = tl.load(p_entry).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def offset_at(c, y, x, p_strides, OFFSET: tl.constexpr):
    """Of one value through the strides of channels, rows and columns that a table row holds."""
    stride_c, stride_h = tl.load(p_strides).to(OFFSET), tl.load(p_strides + 1).to(OFFSET)
    return c * stride_c + y * stride_h + x * tl.load(p_strides + 2).to(OFFSET)


@triton.jit
def copy_tile(p_from, p_to, p_row, top, left, height, width, channels, DENSE: tl.constexpr,
          CHANNELS_LAST: tl.constexpr, OFFSET: tl.constexpr, SOURCE: tl.constexpr, ROWS: tl.constexpr,
          COLUMNS: tl.constexpr):  # fmt: skip
    """A tile as it is, all channels; table entries 9 to 11 are the strides of ``p_to``, those from ``SOURCE`` of ``p_from``."""
    o = tl.arange(0, ROWS * COLUMNS)
    y, x = (top + tl.arange(0, ROWS))[:, None], (left + tl.arange(0, COLUMNS))[None, :]
    for c in range(channels):
        if DENSE and CHANNELS_LAST:
            e = left * channels + c * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            m = (y < height) & (e < width * channels)
            b = tl.load(p_from + y * (width * channels) + e, mask=m)  # stream
            tl.store(p_to + y * (width * channels) + e, b, mask=m)  # stream
        elif DENSE:
            m = (y < height) & (x < width)
            b = tl.load(p_from + (c * height + y) * width + x, mask=m)  # stream
            tl.store(p_to + (c * height + y) * width + x, b, mask=m)  # stream
        else:
            y_o, x_o = top + o // COLUMNS, left + o % COLUMNS
            m_o = (y_o < height) & (x_o < width)
            b_o = tl.load(p_from + offset_at(c, y_o, x_o, p_row + SOURCE, OFFSET), mask=m_o)
            tl.store(p_to + offset_at(c, y_o, x_o, p_row + 9, OFFSET), b_o, mask=m_o)


@triton.jit
def round_half_even(x):
    """To the nearest integer, ties to even, as ``torch.round``; the library call is not in the interpreter.

    Below 2^22 in magnitude the sum has a unit of 1 in the last place; float32 has no finer fractions than halves
    above, which do not matter to a grey level.
    """
    return tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, x)
