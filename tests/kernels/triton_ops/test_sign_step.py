"""The step kernel against the reference, bit for bit: single float32 operations in one order; one launch, bytes, layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import sign_step
from ikd_fast.kernels.triton_ops.launch import trace

pytestmark = pytest.mark.usefixtures("poison")

LIMITS = {"radius": [0.14, 0.15, 0.16], "low": [-2.1, -2.0, -1.8], "high": [2.2, 2.4, 2.6]}
STEP = [0.034, 0.035, 0.036]
SHAPE = (3, 3, 15, 72)
FRAMES = torch.tensor([[15, 72], [11, 70], [5, 33]])


def values(device, seed: int, dtype, layout: str, scale: float, shape=SHAPE) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=g) * scale).to(device, dtype)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "strided":
        wide = torch.zeros(shape[0], shape[1] + 1, shape[2], 2 * shape[3], dtype=dtype, device=device)
        wide[:, 1:, :, 1::2] = x
        return wide[:, 1:, :, 1::2]
    return x


def inputs(device, dtype=torch.float32, layout="contiguous", shape=SHAPE) -> tuple[Tensor, Tensor, Tensor]:
    """A third of the deltas beyond the ball, a tenth of the pixels beyond the range, a tenth of the directions 0."""
    delta = values(device, 0, torch.float32, layout, 0.15, shape)
    direction, x = values(device, 1, dtype, layout, 1.0, shape), values(device, 2, dtype, layout, 1.3, shape)
    return delta, torch.where(direction.abs() < 0.12, torch.zeros_like(direction), direction), x


def both(given, step, **options) -> Tensor:
    kernel, reference = (sign_step(*given, step, **options, backend=b) for b in ("triton", "reference"))
    assert kernel.dtype == reference.dtype == torch.float32
    assert kernel.stride() == reference.stride()
    assert not kernel.isnan().any()
    assert torch.equal(kernel, reference)
    return kernel.cpu()


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (d, name)
        for d in (torch.float32, torch.float16, torch.bfloat16)
        for name in ("contiguous", "channels_last")
    ]
    + [(torch.float32, "strided")],
    ids=str,
)
def test_value(device, dtype, layout) -> None:
    given = inputs(device, dtype, layout)
    out = both(given, STEP, **LIMITS, frames=FRAMES)
    assert not out[2, :, 5:].any()
    assert not out[2, :, :, 33:].any()
    assert 0.03 < (out[0] == 0).float().mean() < 0.2  # pixels beyond the range whose sign leads further
    both(given, -0.03, **LIMITS)


def test_tensors_of_several_layouts_and_dtypes(device) -> None:
    delta, direction, _ = inputs(device)
    mixed = (
        delta,
        direction.to(torch.bfloat16, memory_format=torch.channels_last),
        inputs(device, torch.float16)[2],
    )
    both(mixed, STEP, **LIMITS, frames=FRAMES)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 4, 5, 3), (1, 3, 17, 67)], ids=str)
def test_odd_shapes_and_any_channels(device, shape) -> None:
    both(inputs(device, shape=shape), 0.035, radius=0.15, low=-2.0, high=2.0)


def test_projection_alone_and_images_that_do_not_move(device) -> None:
    delta, direction, x = inputs(device)
    projected = both((delta, None, x), 0.5, **LIMITS, frames=FRAMES)
    direction[1] = float("nan")
    moves = torch.tensor([True, False, True], device=device)
    out = both((delta, direction, x), STEP, **LIMITS, frames=FRAMES, moves=moves)
    assert torch.equal(out[1], projected[1])
    assert not torch.equal(out[0], projected[0])


def test_one_launch_and_bytes(device) -> None:
    given = inputs(device)
    with trace() as record:
        sign_step(*given, STEP, **LIMITS, backend="triton")
    assert record.names == ["stepped_deltas"]
    assert record.bytes == given[0].untyped_storage().nbytes() + (3 * 20 + 3 * 4) * 8


def test_a_nan_pixel_stays_its_own(device) -> None:
    delta, direction, x = inputs(device)
    x[0, 1, 2, 3] = float("nan")
    results = [
        sign_step(delta, direction, x, STEP, **LIMITS, backend=b).cpu() for b in ("triton", "reference")
    ]
    for out in results:
        assert out.isnan().nonzero().tolist() == [[0, 1, 2, 3]]
    torch.testing.assert_close(*results, equal_nan=True, atol=0, rtol=0)


def test_rows_do_not_depend_on_the_batch(device) -> None:
    given = inputs(device)
    out = sign_step(*given, STEP, **LIMITS, frames=FRAMES, backend="triton")
    alone = sign_step(*(x[1:2] for x in given), STEP, **LIMITS, frames=FRAMES[1:2], backend="triton")
    assert torch.equal(alone, out[1:2])


def test_errors_come_before_a_launch(device) -> None:
    x = torch.zeros(1, 3, 4, 4, device=device)
    with trace() as record:
        with pytest.raises(
            TypeError, match=r"expected fp16, bf16 or fp32 for backend='triton', got torch.float64"
        ):
            sign_step(x.double(), x, x, STEP, **LIMITS, backend="triton")
        huge = x[:, :, :1, :1].expand(1, 3, 30000, 30000)
        with pytest.raises(
            ValueError, match=r"delta\[0\] has 2700000000 elements; expected fewer than 2\*\*31"
        ):
            sign_step(huge, huge, huge, STEP, **LIMITS, backend="triton")
    assert record.launches == []
    assert record.bytes == 0
