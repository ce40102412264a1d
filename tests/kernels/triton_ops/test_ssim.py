"""The kernels of ssim against the float64 reference: dtypes, layouts, odd sizes, windows, launches, bytes.

Shapes are small and windows narrow because the interpreter takes milliseconds for each tap of each row or channel.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import ssim
from ikd_fast.kernels.reference import ssim as reference
from ikd_fast.kernels.triton_ops import ssim as kernels
from ikd_fast.kernels.triton_ops.launch import trace
from tests.kernels.layouts import in_layout
from tests.kernels.pairs import by_name
from tests.tolerances import TOLERANCES, assert_gradient, assert_near, assert_value

pytestmark = pytest.mark.usefixtures("poison")

# Blocks are 16 columns, rows and channels; the inputs of a block reach 8 further.
SHAPES = {
    "odd": [(2, 1, 5, 7), (2, 2, 1, 3), (2, 1, 1, 1)],
    "blocks": [(1, 1, 19, 37)],
    "channels": [(1, 17, 2, 2)],
}


def pyramid(shapes, dtype, layout: str, device, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for n, c, h, w in shapes:
        x = torch.rand(n, c, h, w, generator=g).to(device, dtype)
        out.append(in_layout(x, layout))
    return out


def both(shapes, dtype, layouts, device) -> tuple[list[Tensor], list[Tensor]]:
    return tuple(pyramid(shapes, dtype, layout, device, i) for i, layout in enumerate(layouts))


def check(s, t, window: int = 11, sigma: float = 1.5, data_range: float = 1.0) -> list[Tensor]:
    """Values and gradients against the reference; the gradients."""
    settings = (window, sigma, data_range)
    out = kernels.forward(s, t, *settings)
    s64, t64 = [x.double() for x in s], [x.double() for x in t]
    assert_value(out, reference.forward(s64, t64, *settings), s[0].dtype)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
    grads = kernels.backward(upstream, s, t, *settings)
    wanted = reference.backward(upstream.double(), s64, t64, *settings)
    for x, a, b in zip(s, grads, wanted, strict=True):
        assert a.dtype == x.dtype
        # 6.6e-5 remain of parts that cancel where the variance is small: tests/kernels/test_ssim.py
        flat = 1e-4 if x.dtype == torch.float32 and min(window, *x.shape[2:]) == 1 else 0.0
        assert_near(a, b, max(TOLERANCES[x.dtype].gradient, flat), "gradient")
    return grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype, device) -> None:
    check(*both(SHAPES["odd"], dtype, ("contiguous",) * 2, device))


@pytest.mark.parametrize(
    ("shapes", "layout", "window"),
    [("blocks", "contiguous", 5), ("channels", "contiguous", 3), ("blocks", "channels_last", 3), ("channels", "channels_last", 3)],
    ids=str,
)  # fmt: skip
def test_more_than_one_block(shapes, layout, window, device) -> None:
    check(*both(SHAPES[shapes], torch.float32, (layout, layout), device), window=window)


@pytest.mark.parametrize(
    "layouts",
    [
        ("channels_last", "channels_last"),
        ("channels_last", "contiguous"),
        ("strided", "contiguous"),
        ("contiguous", "channels_last"),
        ("contiguous", "strided"),
    ],
    ids=str,
)
def test_layouts(layouts, device) -> None:
    shapes = [(2, 2, 2, 5), (2, 1, 2, 1)]
    s, t = both(shapes, torch.float32, layouts, device)
    for x, grad in zip(s, check(s, t, window=3), strict=True):
        if layouts[0] != "strided" and x.shape[3] > 1:
            assert grad.stride() == x.stride()


def test_student_and_teacher_may_differ_in_dtype(device) -> None:
    s = pyramid([(1, 2, 4, 5)], torch.bfloat16, "contiguous", device, 0)
    check(s, pyramid([(1, 2, 4, 5)], torch.float32, "contiguous", device, 1), window=5)


@pytest.mark.parametrize(("window", "sigma"), [(1, 1.5), (17, 3.0), (19, 0.5)])
def test_windows_and_spans(window, sigma, device) -> None:
    # 8 to either side fill a span of 32 columns; 9 need one of 64
    check(*both([(1, 1, 4, 21)], torch.float32, ("contiguous",) * 2, device), window=window, sigma=sigma)
    check(*both([(1, 1, 10, 9)], torch.float32, ("channels_last",) * 2, device), window=window, sigma=sigma)


def test_the_unit_is_the_data_range(device) -> None:
    s, t = both([(1, 1, 6, 5)], torch.float32, ("contiguous",) * 2, device)
    check([s[0] * 255.0], [t[0] * 255.0], data_range=255.0)


def test_offsets_and_closeness_keep_their_digits(device) -> None:
    g = torch.Generator().manual_seed(3)
    t = (0.9 + 2.0**-6 * torch.rand(1, 1, 9, 9, generator=g)).to(device)
    s = t + (2.0**-9 * torch.rand(t.shape, generator=g)).to(device)
    want = reference.forward([s.double()], [t.double()], 11, 1.5, 1.0)
    assert 0 < float(want) < 1e-3
    # S - T is exact to 2^-24 / 2^-9 of its size, and enters squared
    assert_near(kernels.forward([s], [t], 11, 1.5, 1.0), want, 4 * 2.0**-15)
    assert float(kernels.forward([t], [t], 11, 1.5, 1.0)) <= 1e-9  # 1e-12 over a denominator near 1e-3


def test_rounding_is_clamped(device) -> None:
    g = torch.Generator().manual_seed(5)
    s, t = ((torch.rand(1, 1, 13, 13, generator=g) * 0.05).to(device) for _ in range(2))
    for x in (s, t):
        x[..., 6:] += 1000.0
    out = kernels.forward([s], [t], 11, 1.5, 1.0)
    grad = kernels.backward(torch.ones_like(out), [s], [t], 11, 1.5, 1.0)[0]
    assert 0 <= float(out) <= 1
    assert bool(grad.isfinite().all())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize(("value", "layout"), [(math.nan, "contiguous"), (math.inf, "channels_last")])
def test_what_is_not_finite_shows_in_its_plane_alone(value, layout, device) -> None:
    # channels_last: planes are lanes of one product, whose columns do not mix
    s, t = both([(2, 2, 3, 3)], torch.float32, (layout, layout), device)
    s[0][1, 1, 1, 1] = value
    out = kernels.forward(s, t, 3, 1.5, 1.0)
    grad = kernels.backward(torch.ones_like(out), s, t, 3, 1.5, 1.0)[0]
    assert out.isnan().tolist() == [[False, True]]
    assert bool(grad[1, 1].isnan().all())
    assert bool(grad[1, 0].isfinite().all())
    assert bool(grad[0].isfinite().all())


def test_empty_batch(device) -> None:
    x = [torch.zeros(0, 3, 4, 4, device=device), torch.zeros(0, 3, 2, 2, device=device)]
    out = kernels.forward(x, x, 11, 1.5, 1.0)
    assert out.shape == (2, 0)
    assert [g.shape for g in kernels.backward(out, x, x, 11, 1.5, 1.0)] == [y.shape for y in x]


@pytest.mark.parametrize("levels", [1, 5])
@pytest.mark.parametrize("images", [1, 3])
def test_launches_do_not_grow_with_levels_or_images(levels, images) -> None:
    maps = [torch.empty(images, 8, 2**i, 4, device="meta") for i in range(levels)]
    with trace(run=False) as forward:
        out = kernels.forward(maps, maps, 11, 1.5, 1.0)
    with trace(run=False) as backward:
        kernels.backward(out, maps, maps, 11, 1.5, 1.0)
    assert forward.names == ["ssim_moments", "pyramid_distance_finish"]
    assert backward.names == ["ssim_moments", "ssim_adjoint"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_extra_memory_is_the_gradient_and_three_floats_an_element(dtype) -> None:
    shapes = [(2, 256, h, w) for h, w in ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))]
    s = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    with trace(run=False) as record:
        kernels.backward(kernels.forward(s, s, 11, 1.5, 1.0), s, s, 11, 1.5, 1.0)
    elements = sum(x.numel() for x in s)
    needed = elements * (dtype.itemsize + 12)
    assert needed <= record.bytes <= 1.001 * needed


def test_operation_by_name_runs_the_kernels(device) -> None:
    s, t = both([(1, 1, 4, 5), (1, 1, 2, 2)], torch.float32, ("contiguous",) * 2, device)
    for a, b in by_name(lambda s, t, backend: ssim(s, t, window=3, backend=backend), s, t, launches=4):
        assert_gradient(a, b, torch.float32)


def test_repeats_give_the_same_bits(device) -> None:
    s, t = both([(1, 2, 3, 20)], torch.float32, ("contiguous",) * 2, device)
    assert torch.equal(kernels.forward(s, t, 3, 1.5, 1.0), kernels.forward(s, t, 3, 1.5, 1.0))


def test_an_image_beyond_32_bit_offsets_is_refused_before_any_launch() -> None:
    x = [torch.empty(1, 2, 2**15, 2**15, device="meta")]
    with (
        trace(run=False) as record,
        pytest.raises(
            ValueError, match=r"level 0 has 2147483648 elements; expected fewer than 2\*\*31 an image"
        ),
    ):
        kernels.forward(x, x, 11, 1.5, 1.0)
    assert record.launches == []
