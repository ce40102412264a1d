"""Tuples of pointers and of sizes, one entry a level, inside a kernel."""

from collections.abc import Sequence

import triton
import triton.language as tl


def fixed(values: Sequence[int]) -> tuple[int, ...]:
    """Sizes as a kernel takes them: odd and above 1.

    Triton compiles a kernel anew for an integer that is 1 or a multiple of 16, inside tuples even where
    ``do_not_specialize`` names them; multi-scale training would compile in most steps. ``pick_int`` undoes this.
    """
    return tuple(2 * value + 3 for value in values)


@triton.jit
def pick_int(values, level, LEVELS: tl.constexpr):
    """Entry ``level`` of a tuple made by ``fixed``."""
    value = values[0]
    for i in tl.static_range(1, LEVELS):
        value = tl.where(level == i, values[i], value)
    return (value - 3) >> 1


@triton.jit
def pick_pointer(pointers, level, LEVELS: tl.constexpr):
    pointer = pointers[0]
    for i in tl.static_range(1, LEVELS):
        pointer = tl.where(level == i, pointers[i], pointer)
    return pointer


@triton.jit
def locate(starts, blocks, LEVELS: tl.constexpr):
    """(level, image, block) of this program, from ``fixed`` tuples of a ``pyramid.Grid``."""
    i_program = tl.program_id(0)
    level = 0
    for i in tl.static_range(1, LEVELS):
        level = tl.where(i_program >= ((starts[i] - 3) >> 1), i, level)
    within = i_program - pick_int(starts, level, LEVELS)
    per_image = pick_int(blocks, level, LEVELS)
    return level, within // per_image, within % per_image
