"""input_diversity against dense matrices in float64: values, adjoint, padding, registration, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import input_diversity
from ikd_fast.kernels.ops import input_diversity as op
from tests.kernels.resampling import adjoint_by_matrix, by_matrix, every_window
from tests.tolerances import DTYPES, gradcheck

FRAMES = torch.tensor([[13, 21], [9, 16], [13, 21], [5, 21]])
WINDOWS = torch.tensor([[2, 1, 18, 11], [3, 4, 5, 3], [0, 0, 21, 13], [20, 0, 1, 5]])
FILL = torch.tensor([0.25, -1.5, 2.0])


def stack(dtype=torch.float32, layout: str = "contiguous", seed: int = 0) -> Tensor:
    x = torch.randn(4, 3, 13, 21, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "strided":
        wide = torch.zeros(4, 3, 13, 42, dtype=dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def bound(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit of the dtype, after float32 whose source coordinates, up to 21, are off by some 4 units of 2^-24: times the
    difference of two neighbours, up to 8 here.
    """
    unit = 0.0 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps / 2
    return unit * expected.abs() + (1e-12 if dtype == torch.float64 else 21 * 4 * 8 * 2.0**-24)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradient(dtype, layout) -> None:
    x, upstream = stack(dtype, layout).requires_grad_(), stack(dtype, layout, seed=1)
    out = input_diversity(x, FRAMES, WINDOWS, FILL.view(3, 1, 1))
    (grad,) = torch.autograd.grad(out, x, upstream)
    assert out.dtype == grad.dtype == dtype
    assert out.stride() == torch.empty_like(x).stride()
    expected, adjoint = by_matrix(x, FRAMES, WINDOWS, FILL), adjoint_by_matrix(upstream, FRAMES, WINDOWS)
    assert ((out.detach().double() - expected).abs() <= bound(expected, dtype)).all()
    assert ((grad.double() - adjoint).abs() <= bound(adjoint, dtype)).all()
    # An untouched image and padding, bit for bit, both ways.
    for given, got in ((x.detach(), out.detach()), (upstream, grad)):
        assert torch.equal(got[2], given[2])
        assert torch.equal(got[1, :, 9:], given[1, :, 9:])
        assert torch.equal(got[1, :, :, 16:], given[1, :, :, 16:])


def test_every_window_of_every_small_frame() -> None:
    frames, windows, shape = every_window(9)
    x, upstream = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    out = input_diversity(x, frames, windows, torch.tensor(0.5))
    (grad,) = torch.autograd.grad(out, x, upstream)
    torch.testing.assert_close(
        out.detach(), by_matrix(x, frames, windows, torch.tensor(0.5)), atol=1e-13, rtol=0
    )
    torch.testing.assert_close(grad, adjoint_by_matrix(upstream, frames, windows), atol=1e-13, rtol=0)


def test_gradcheck() -> None:
    frames, windows = torch.tensor([[5, 6], [4, 5]]), torch.tensor([[1, 0, 4, 4], [0, 1, 5, 2]])
    x = stack(torch.float64)[:2, :1, :5, :6].clone().requires_grad_()
    gradcheck(lambda v: input_diversity(v, frames, windows, FILL[:1]), x)


def test_second_derivatives_are_refused() -> None:
    x = stack().requires_grad_()
    out = input_diversity(x, FRAMES, WINDOWS, FILL)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        grad.sum().backward()


def test_inputs_stay_and_fills_of_any_shape_agree() -> None:
    x = stack()
    before = x.clone()
    want = input_diversity(x, FRAMES, WINDOWS, torch.full((3,), 0.5))
    for fill in (
        torch.tensor(0.5),
        torch.full((1, 1, 1), 0.5, dtype=torch.float64),
        torch.full((3, 1, 1), 0.5),
    ):
        assert torch.equal(input_diversity(x, FRAMES, WINDOWS, fill), want)
    assert torch.equal(x, before)
    whole = input_diversity(x[2:3], FRAMES[2:3], WINDOWS[2:3], FILL)
    assert whole.data_ptr() != x[2:3].data_ptr()
    none = torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 4, dtype=torch.int64)
    assert input_diversity(x[:0], *none, FILL).shape == (0, 3, 13, 21)


def test_opcheck() -> None:
    for layout in ("contiguous", "channels_last"):
        x = stack(layout=layout)
        torch.library.opcheck(op._op, (x.requires_grad_(), FRAMES, WINDOWS, FILL, "auto"))
        torch.library.opcheck(op._op_backward, (x.detach(), FRAMES, WINDOWS, "auto"))


def test_compiled_equals_eager() -> None:
    def function(x, frames, windows, fill):
        return input_diversity(x * 0.9, frames, windows, fill) * 1.1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        x = stack().requires_grad_()
        out = call(x, FRAMES, WINDOWS, FILL)
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(3, 4, 5)}, TypeError, r"\[N, C, H, W\], got torch.float32 \[3, 4, 5\]"),
        ({"images": torch.zeros(1, 3, 4, 5).byte()}, TypeError, r"expected fp16, .* got torch.uint8"),
        ({"frames": torch.tensor([4, 5])}, ValueError, r"frames: expected torch.int64 \[1, 2\] .*\[2\]"),
        ({"frames": torch.tensor([[4.0, 5.0]])}, ValueError, r"frames: expected torch.int64 .*torch.float32"),
        ({"frames": torch.tensor([[4, 6]])}, ValueError, r"frames\[0\]: .* within the image's 4x5, got 4x6"),
        ({"frames": torch.tensor([[0, 5]])}, ValueError, r"frames\[0\]: .*got 0x5"),
        ({"windows": torch.tensor([[0, 0, 4]])}, ValueError, r"windows: expected torch.int64 \[1, 4\]"),
        (
            {"windows": torch.tensor([[2, 0, 4, 4]])},
            ValueError,
            r"windows\[0\]: .*4x5 \(h, w\), got \(2, 0, 4, 4\)",
        ),
        ({"windows": torch.tensor([[0, 0, 0, 4]])}, ValueError, r"windows\[0\]: .*got \(0, 0, 0, 4\)"),
        ({"windows": torch.tensor([[-1, 0, 3, 4]])}, ValueError, r"windows\[0\]: .*got \(-1, 0, 3, 4\)"),
        ({"fill": torch.zeros(2)}, ValueError, r"fill: expected a scalar, \[3\] or \[3, 1, 1\], got \[2\]"),
        (
            {"fill": torch.zeros(3, requires_grad=True)},
            ValueError,
            r"fill requires a gradient.*fill.detach\(\)",
        ),
        ({"backend": "cuda"}, ValueError, r"backend must be one of .* got 'cuda'"),
    ],
)
def test_errors(change, error, message) -> None:
    usual = {
        "images": torch.zeros(1, 3, 4, 5),
        "frames": torch.tensor([[4, 5]]),
        "windows": torch.tensor([[1, 1, 3, 2]]),
        "fill": torch.zeros(()),
    }
    with pytest.raises(error, match=message):
        input_diversity(**{**usual, **change})
