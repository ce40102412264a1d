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
def round_half_even(x):
    """To the nearest integer, ties to even, as ``torch.round``; the library call is not in the interpreter.

    Below 2^22 in magnitude the sum has a unit of 1 in the last place; float32 has no finer fractions than halves
    above, which do not matter to a grey level.
    """
    return tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, x)
