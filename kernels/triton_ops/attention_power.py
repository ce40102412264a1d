"""f of attention statistics, |x|^p or max(x, 0)^p, and its derivative."""

import triton
import triton.language as tl

from .fgd_tiles import sign

# f as the kernels know it: |x|, x^2, or any other power, by logarithms.
GENERAL, MAGNITUDE, SQUARE = (tl.constexpr(i) for i in range(3))


@triton.jit
def power_of(x, power, POWER: tl.constexpr, POSITIVE: tl.constexpr):
    """f(x); NaN stays NaN."""
    if POSITIVE:
        x = tl.where(x < 0, 0.0, x)
    if POWER == SQUARE:
        y = x * x
    else:
        y = tl.abs(x)
        if POWER == GENERAL:
            y = tl.where(y > 0, tl.exp2(power * tl.log2(tl.where(y > 0, y, 1.0))), y)
    return y


@triton.jit
def slope_of(x, power, POWER: tl.constexpr, POSITIVE: tl.constexpr):
    """f'(x), 0 at 0."""
    if POSITIVE:
        x = tl.where(x < 0, 0.0, x)
    if POWER == SQUARE:
        y = 2.0 * x
    else:
        y = sign(x)
        if POWER == GENERAL:
            y *= power * power_of(x, power - 1.0, POWER, False)
    return y
