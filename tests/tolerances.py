"""How close is close: one table from the dtype of the inputs to the tolerances, with its reasons.

Every operation computes in float32 for fp16, bf16 and fp32 inputs, and references get the same rounded inputs in
float64. So values differ by float32 rounding alone: pairwise sums of up to 1e6 terms and a few exponentials stay within
some 10 units of 2^-24, far inside 1e-5. Gradients come back in the inputs' dtype: half a unit in its last place is
2^-11 (fp16) or 2^-8 (bf16), relative; the table leaves a factor of two. Both are relative to the largest magnitude of
what is compared, since a sum's error scales with its terms and not with its result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    value: float
    gradient: float


TOLERANCES = {
    torch.float64: Tolerance(value=1e-12, gradient=1e-11),
    torch.float32: Tolerance(value=1e-5, gradient=2e-5),
    torch.float16: Tolerance(value=1e-5, gradient=2.0**-10),
    torch.bfloat16: Tolerance(value=1e-5, gradient=2.0**-7),
}
DTYPES = list(TOLERANCES)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str = "value") -> None:
    """``max |actual - expected| <= tolerance * max |expected|``, shapes equal, nothing NaN."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    scale = max(float(expected.detach().abs().max()), 1e-30)
    error = float((actual.detach().double() - expected.detach().double()).abs().max())
    assert error <= tolerance * scale, (
        f"{what}: error {error / scale:.3g} of {scale:.6g}, allowed {tolerance:.3g}"
    )


def assert_value(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "value") -> None:
    assert_near(actual, expected, TOLERANCES[dtype].value, what)


def assert_gradient(
    actual: Tensor | None, expected: Tensor | None, dtype: torch.dtype, what: str = "gradient"
) -> None:
    assert actual is not None, f"{what}: none came"
    assert expected is not None, f"{what}: the reference has none"
    assert_near(actual, expected, TOLERANCES[dtype].gradient, what)


def gradcheck(function, *inputs: Tensor) -> None:
    """Finite differences in float64 against the gradient of every input that requires one."""
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)
