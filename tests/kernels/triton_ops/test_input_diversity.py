"""The diversity kernel against dense matrices in float64: every window of small frames, dtypes, layouts, both directions.

Weights are quotients of integers, right to one unit of 2^-23 or two, and four products are added: some 8 units of 2^-24 of the
largest value. A cast to half types rounds to nearest on a GPU and cuts off in the interpreter: one unit in the last place.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ikd_fast.kernels import input_diversity
from ikd_fast.kernels.triton_ops.launch import trace
from tests.kernels.resampling import adjoint_by_matrix, by_matrix, every_window

pytestmark = pytest.mark.usefixtures("poison")

UNIT = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SHAPE = (4, 3, 11, 136)
FRAMES = torch.tensor([[11, 136], [9, 131], [11, 136], [5, 90]])
WINDOWS = torch.tensor([[3, 2, 101, 8], [0, 3, 130, 6], [0, 0, 136, 11], [80, 4, 7, 1]])
FILL = torch.tensor([0.25, -1.5, 2.0])


def values(device, dtype=torch.float32, layout: str = "contiguous", seed: int = 0, shape=SHAPE) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "strided":
        wide = torch.zeros(shape[0], shape[1] + 1, shape[2], 2 * shape[3], dtype=dtype, device=device)
        wide[:, 1:, :, 1::2] = x
        return wide[:, 1:, :, 1::2]
    return x


def run(x: Tensor, upstream: Tensor, frames=FRAMES, windows=WINDOWS, fill=FILL) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    out = input_diversity(leaf, frames, windows, fill.to(x.device), backend="triton")
    (grad,) = torch.autograd.grad(out, leaf, upstream)
    return out.detach(), grad


def assert_close(actual: Tensor, expected: Tensor) -> None:
    unit = UNIT[actual.dtype] if actual.dtype != torch.float32 else 0.0
    assert not actual.isnan().any()
    error = (actual.cpu().double() - expected).abs()
    assert (error <= unit * expected.abs() + 8 * 2.0**-24 * float(expected.abs().max())).all()


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(d, name) for d in UNIT for name in ("contiguous", "channels_last")] + [(torch.float32, "strided")],
    ids=str,
)
def test_values_and_adjoint(device, dtype, layout) -> None:
    x, upstream = values(device, dtype, layout), values(device, dtype, layout, seed=1)
    out, grad = run(x, upstream)
    assert out.stride() == torch.empty_like(x).stride()
    assert_close(out, by_matrix(x.cpu(), FRAMES, WINDOWS, FILL))
    assert_close(grad, adjoint_by_matrix(upstream.cpu(), FRAMES, WINDOWS))
    for given, got in ((x, out), (upstream, grad)):
        assert torch.equal(got[2], given[2])
        assert torch.equal(got[1, :, 9:], given[1, :, 9:])
        assert torch.equal(got[1, :, :, 131:], given[1, :, :, 131:])


def test_every_window_of_every_small_frame(device) -> None:
    frames, windows, shape = every_window(6, channels=1)
    x, upstream = (values(device, seed=i, shape=shape) for i in range(2))
    out, grad = run(x, upstream, frames, windows, torch.tensor(0.5))
    assert_close(out, by_matrix(x.cpu(), frames, windows, torch.tensor(0.5)))
    assert_close(grad, adjoint_by_matrix(upstream.cpu(), frames, windows))


def test_adjoint_identity(device) -> None:
    """<A x, y> = <x, A' y> with fill 0, of sums in float64: off by the roundings of single values alone."""
    x, y = values(device), values(device, seed=1)
    out, grad = run(x, y, fill=torch.zeros(1))
    left, right = (out.double() * y.double()).sum(), (x.double() * grad.double()).sum()
    size = float((out.double() * y.double()).abs().sum())
    assert float((left - right).abs()) <= 4 * 2.0**-24 * size


@pytest.mark.parametrize("rate", [0.03, 0.5, 0.9])
def test_pixels_equal_interpolate(device, rate) -> None:
    """torch's own resize in float64, on a side that is not a multiple of anything."""
    (h, w) = (37, 103)
    x = values(device, shape=(1, 1, h, w))
    h_out, w_out = int(h * rate), int(w * rate)
    out = input_diversity(
        x,
        torch.tensor([[h, w]]),
        torch.tensor([[1, 1, w_out, h_out]]),
        torch.zeros((), device=device),
        backend="triton",
    )
    expected = F.interpolate(x.cpu().double(), size=(h_out, w_out), mode="bilinear", align_corners=False)
    assert_close(out[..., 1 : 1 + h_out, 1 : 1 + w_out], expected)


def test_one_launch_each_way_and_bytes(device) -> None:
    x = values(device).requires_grad_()
    size = x.untyped_storage().nbytes() + 4 * 20 * 8
    with trace() as record:
        out = input_diversity(x, FRAMES, WINDOWS, FILL.to(device), backend="triton")
    assert record.names == ["shrunken_images"]
    assert record.bytes == size
    with trace() as record:
        out.sum().backward()
    assert record.names == ["shrunken_images"]
    assert record.bytes == size


def test_repeats_are_equal_and_rows_do_not_depend_on_the_batch(device) -> None:
    x, upstream = values(device)[:2], values(device, seed=1)[:2]
    first, again = (run(x, upstream, FRAMES[:2], WINDOWS[:2]) for _ in range(2))
    alone = run(x[1:2], upstream[1:2], FRAMES[1:2], WINDOWS[1:2])
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[1:2], c)


def test_a_nan_reaches_only_what_reads_it(device) -> None:
    """Padding and what lies outside the window stay out of the sums of both directions."""
    x, upstream = values(device)[:, :1].clone(), values(device, seed=1)[:, :1].clone()
    want = run(x, upstream, fill=FILL[:1])
    x[1, :, 9:], upstream[1, :, 9:] = float("nan"), float("nan")
    upstream[0, :, :2], upstream[3, :, :4, :90] = float("nan"), float("nan")
    out, grad = run(x, upstream, fill=FILL[:1])
    assert torch.equal(out[1, :, :9], want[0][1, :, :9])
    assert torch.equal(grad[[0, 3]], want[1][[0, 3]])
    assert torch.equal(grad[1, :, :9], want[1][1, :, :9])


def test_errors_come_before_a_launch(device) -> None:
    x = torch.zeros(1, 1, 1, 1, device=device)
    with trace() as record:
        for shape, message in (
            ((1, 1, 2, 32768), r"sides of at most 32767 with Triton, got 2x32768; write backend='reference'"),
            ((1, 3, 30000, 30000), r"images\[0\] has 2700000000 elements; expected fewer than 2\*\*31"),
        ):
            frames, windows = torch.tensor([shape[2:]]), torch.tensor([[0, 0, 1, 1]])
            with pytest.raises(ValueError, match=message):
                input_diversity(x.expand(shape), frames, windows, x[0], backend="triton")
        with pytest.raises(
            TypeError, match=r"expected fp16, bf16 or fp32 for backend='triton', got torch.float64"
        ):
            input_diversity(
                x.double(), torch.tensor([[1, 1]]), torch.tensor([[0, 0, 1, 1]]), x[0], backend="triton"
            )
    assert record.launches == []
    assert record.bytes == 0
