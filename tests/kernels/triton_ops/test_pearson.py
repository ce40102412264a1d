"""The kernels of pearson against the float64 reference: dtypes, layouts, odd sizes, constant channels, launches, bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import pearson
from ikd_fast.kernels.reference import pearson as reference
from ikd_fast.kernels.triton_ops import pearson as kernels
from ikd_fast.kernels.triton_ops.launch import trace
from tests.kernels.layouts import in_layout
from tests.kernels.pairs import by_name
from tests.tolerances import assert_gradient, assert_value

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS, MIN_STD = 1e-6, 1e-3
SHAPES = {
    "odd": [(2, 3, 5, 7), (2, 7, 3, 3), (2, 5, 1, 2)],
    "aligned": [(2, 8, 16, 20), (2, 8, 4, 5)],
    # more than one tile of positions, or of channels, the last ones short: in rows, channels last, any strides
    "long": [(2, 5, 37, 31)],
    "last": [(1, 34, 13, 11)],
    "any": [(2, 9, 17, 17)],
}


def pyramid(shapes, dtype, layout: str, device, seed: int, offset: float = 0.0) -> list[Tensor]:
    """Channels of their own mean and scale; sides of any two seeds correlate."""
    out = []
    for n, c, h, w in shapes:
        common, own = (torch.Generator().manual_seed(k) for k in (50 + c, seed))
        x = torch.randn(n, c, h, w, generator=common) + torch.randn(n, c, h, w, generator=own)
        x = x * torch.randn(1, c, 1, 1, generator=own).exp() + torch.randn(1, c, 1, 1, generator=own) + offset
        x = x.to(device, dtype)
        out.append(in_layout(x, layout))
    return out


def check(student, teacher) -> list[Tensor]:
    """The gradients, once they and the values are as the reference has them."""
    out, saved = kernels.forward(student, teacher, EPS, MIN_STD)
    s64, t64 = [x.double() for x in student], [x.double() for x in teacher]
    expected, kept = reference.forward(s64, t64, EPS, MIN_STD)
    assert_value(out, expected, student[0].dtype)
    means = slice(reference.MEAN_S, reference.MEAN_T + 1)
    largest = max(float(x.abs().max()) for x in (*s64, *t64))
    assert (saved[means] - kept[means]).abs().max() <= 1e-6 * largest
    upstream = torch.randn(len(out), generator=torch.Generator().manual_seed(1)).to(out.device)
    grads = kernels.backward(upstream, student, teacher, saved)
    wanted = reference.backward(upstream.double(), s64, t64, kept)
    for s, a, b in zip(student, grads, wanted, strict=True):
        assert a.dtype == s.dtype
        if s[:, 0].numel() == 2:
            # r = 1 or -1: nothing but rounding is left of terms of this size
            slope = kept[reference.SLOPE_T].abs().max() * t64[-1].abs().max() * upstream.abs().max()
            assert (a - b).abs().max() <= 1e-6 * slope
        else:
            assert_gradient(a, b, s.dtype)
    return grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", ["odd", "aligned"])
def test_contiguous(shapes, dtype, device) -> None:
    check(*(pyramid(SHAPES[shapes], dtype, "contiguous", device, i) for i in (0, 1)))


@pytest.mark.parametrize(
    "layouts",
    [
        ("channels_last", "channels_last"),
        ("strided", "contiguous"),
        ("contiguous", "channels_last"),
        ("channels_last", "strided"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("shapes", "dtype"), [("odd", torch.float32), ("aligned", torch.bfloat16)], ids=str)
def test_layouts(shapes, dtype, layouts, device) -> None:
    s, t = (pyramid(SHAPES[shapes], dtype, layout, device, i) for i, layout in enumerate(layouts))
    for x, grad in zip(s, check(s, t), strict=True):
        if layouts[0] != "strided":
            assert grad.stride() == x.stride()


@pytest.mark.parametrize(
    ("shapes", "layouts"),
    [
        ("long", ("contiguous", "contiguous")),
        ("last", ("channels_last", "channels_last")),
        ("any", ("strided", "channels_last")),
    ],
    ids=str,
)
def test_several_tiles(shapes, layouts, device) -> None:
    check(*(pyramid(SHAPES[shapes], torch.float32, x, device, i) for i, x in enumerate(layouts)))


def test_student_and_teacher_may_differ_in_dtype(device) -> None:
    s = pyramid(SHAPES["odd"], torch.bfloat16, "contiguous", device, 0)
    check(s, pyramid(SHAPES["odd"], torch.float32, "contiguous", device, 1))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # of masked elements
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps_far_from_zero_lose_nothing(dtype, device) -> None:
    """Means of 1e4, in several tiles; half precision rounds the maps, the reference sees them rounded."""
    s, t = (pyramid(SHAPES["long"], dtype, "contiguous", device, i, offset=1e4) for i in (0, 1))
    if dtype != torch.float32:
        s, t = ([(x[0] + 40 * (x[0] - 1e4)).to(dtype)] for x in (s, t))
    check(s, t)


def test_outliers(device) -> None:
    """The first element of a channel, to which sums are relative, may be far from all others."""
    s, t = (pyramid(SHAPES["long"], torch.float32, "contiguous", device, i) for i in (0, 1))
    s[0][0, :, 0, 0] = 1e4
    t[0][0, 0, 0, 0] = -1e4
    t[0][1, 1, 5, 5] = 1e4
    check(s, t)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_constant_channels(layout, offset, device) -> None:
    shapes = SHAPES["long"] if layout == "contiguous" else [(2, 5, 13, 11)]
    s, t = (pyramid(shapes, torch.float32, layout, device, i) for i in (0, 1))
    s[0][:, 1:3] = 0.1 + offset
    t[0][:, 2:4] = 0.3 + offset
    (grad,) = check(s, t)
    assert not bool(grad[:, 2].any())
    assert float(grad[:, 1].abs().max()) > 0


def test_equal_maps_give_zero_and_no_gradient(device) -> None:
    s = pyramid(SHAPES["odd"], torch.float32, "contiguous", device, 0)
    out, saved = kernels.forward(s, s, EPS, MIN_STD)
    # On a GPU the compiler may fuse a product into the next sum: rounding of Z is left.
    assert float(out.max()) < 1e-6
    for x, grad in zip(s, kernels.backward(torch.ones_like(out), s, s, saved), strict=True):
        scale = 1 / (x[:, 0].numel() * x.shape[1] * float(x.std((0, 2, 3)).min()))
        assert float(grad.abs().max()) < 1e-5 * scale


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [(0, 0, 0, 0), (1, 2, 3, 1)])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_shows(bad, where, side, device) -> None:
    sides = [pyramid(SHAPES["odd"][:2], torch.float32, "contiguous", device, i) for i in (0, 1)]
    sides[side][0][where] = bad
    out, saved = kernels.forward(*sides, EPS, MIN_STD)
    assert out.isnan().tolist() == [True, False]
    grads = kernels.backward(torch.ones_like(out), *sides, saved)
    assert bool(grads[0][:, where[1]].isnan().all())
    assert bool(grads[1].isfinite().all())


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (1, 3, 1, 1)], ids=str)
def test_nothing_to_correlate_is_zero(shape, device) -> None:
    x = [torch.ones(shape, device=device)]
    y = [torch.zeros(shape, device=device)]
    out, saved = kernels.forward(x, y, EPS, MIN_STD)
    assert torch.equal(out, torch.zeros(1, device=device))
    (grad,) = kernels.backward(torch.ones_like(out), x, y, saved)
    assert torch.equal(grad, torch.zeros(shape, device=device))
    if shape[0]:  # beside a level that is not empty
        full = [pyramid([(shape[0], 2, 4, 5)], torch.float32, "contiguous", device, i)[0] for i in (0, 1)]
        both, _ = kernels.forward([x[0], full[0]], [y[0], full[1]], EPS, MIN_STD)
        alone, _ = kernels.forward([full[0]], [full[1]], EPS, MIN_STD)
        assert torch.equal(both, torch.cat([out, alone]))


@pytest.mark.parametrize("levels", [1, 5])
@pytest.mark.parametrize("images", [1, 3])
def test_launches_do_not_grow_with_levels_or_images(levels, images) -> None:
    maps = [torch.empty(images, 8 + 300 * i, 2**i, 4, device="meta") for i in range(levels)]
    with trace(run=False) as forward:
        out, saved = kernels.forward(maps, maps, EPS, MIN_STD)
    with trace(run=False) as backward:
        kernels.backward(out, maps, maps, saved)
    assert forward.names == ["pearson_moments", "pearson_channels", "pearson_mean"]
    assert backward.names == ["pearson_backward"]


@pytest.mark.parametrize(("layout", "share"), [("contiguous", 0.02), ("channels_last", 0.05)])
@pytest.mark.parametrize("images", [2, 16])
def test_extra_memory_is_the_gradient_and_little_else(images, layout, share) -> None:
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    s = [
        torch.empty(images, 256, h, w, dtype=torch.bfloat16, device="meta", memory_format=memory)
        for h, w in ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
    ]
    with trace(run=False) as record:
        out, saved = kernels.forward(s, s, EPS, MIN_STD)
        kernels.backward(out, s, s, saved)
    maps = sum(2 * x.numel() * x.element_size() for x in s)
    # Five float32 moments of 1024 or 128 positions beside the gradient; the bound is 1.1 times the maps.
    assert maps / 2 <= record.bytes <= (0.5 + share) * maps


def test_operation_by_name_runs_the_kernels(device) -> None:
    s, t = (pyramid(SHAPES["odd"][:2], torch.float32, "contiguous", device, i) for i in (0, 1))
    for a, b in by_name(pearson, s, t, launches=4):
        assert_gradient(a, b, torch.float32)


def test_repeats_give_the_same_bits(device) -> None:
    s, t = (pyramid(SHAPES["aligned"], torch.float32, "contiguous", device, i) for i in (0, 1))
    first, saved = kernels.forward(s, t, EPS, MIN_STD)
    again, kept = kernels.forward(s, t, EPS, MIN_STD)
    assert torch.equal(first, again)
    assert torch.equal(saved, kept)


def test_an_image_beyond_32_bit_offsets_is_refused_before_any_launch() -> None:
    x = [torch.empty(1, 2, 2**15, 2**15, device="meta")]
    with (
        trace(run=False) as record,
        pytest.raises(
            ValueError, match=r"level 0 has 2147483648 elements; expected fewer than 2\*\*31 an image"
        ),
    ):
        kernels.forward(x, x, EPS, MIN_STD)
    assert record.launches == []
