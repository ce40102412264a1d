"""The channel_kl kernels against the float64 reference: dtypes, layouts, odd sizes, extremes, launches, bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import channel_kl
from ikd_fast.kernels.reference import channel_kl as reference
from ikd_fast.kernels.triton_ops import channel_kl as kernels
from ikd_fast.kernels.triton_ops.launch import trace
from tests.kernels.layouts import in_layout
from tests.kernels.pairs import by_name
from tests.tolerances import assert_gradient, assert_value

pytestmark = [
    pytest.mark.usefixtures("poison"),
    # Lanes beyond a map hold infinities, of which numpy warns.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = {
    "odd": [(2, 3, 5, 7), (2, 7, 3, 3), (2, 5, 1, 1)],
    "aligned": [(2, 8, 16, 20), (2, 16, 8, 10), (2, 8, 4, 5)],
}
# More than one run of positions (of 4096, channels innermost 256) and more than one group of channels, none of them whole.
LONG = {"contiguous": (1, 5, 61, 69), "channels_last": (1, 70, 17, 19), "strided": (1, 5, 61, 69)}


def pyramid(shapes, dtype, layout: str, device, seed: int, scale: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for n, c, h, w in shapes:
        x = (torch.randn(n, c, h, w, generator=g) * scale).to(device, dtype)
        out.append(in_layout(x, layout))
    return out


def check(student, teacher, tau: float = 2.0) -> None:
    out, stats = kernels.forward(student, teacher, tau)
    s64, t64 = [x.double() for x in student], [x.double() for x in teacher]
    want, stats64 = reference.forward(s64, t64, tau)
    assert out.dtype == stats.dtype == torch.float32
    assert_value(out, want, student[0].dtype)
    for row, row64 in zip(stats, stats64, strict=True):
        assert_value(row, row64, student[0].dtype, "statistics")
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
    grads = kernels.backward(upstream, student, teacher, stats, tau)
    wanted = reference.backward(upstream.double(), s64, t64, stats64, tau)
    for s, a, b in zip(student, grads, wanted, strict=True):
        assert a.dtype == s.dtype
        if s.shape[2:] == (1, 1):  # one position: both distributions are the same
            assert not a.any()
        else:
            assert_gradient(a, b, s.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES)
def test_contiguous(shapes, dtype, device) -> None:
    check(*(pyramid(SHAPES[shapes], dtype, "contiguous", device, i) for i in (0, 1)))


@pytest.mark.parametrize(
    "layouts",
    [("channels_last", "channels_last"), ("strided", "contiguous"), ("contiguous", "channels_last")],
    ids=str,
)
@pytest.mark.parametrize("shapes", SHAPES)
def test_layouts(shapes, layouts, device) -> None:
    s, t = (pyramid(SHAPES[shapes], torch.bfloat16, layout, device, i) for i, layout in enumerate(layouts))
    check(s, t)
    if layouts[0] != "strided":
        _, stats = kernels.forward(s, t, 1.0)
        grads = kernels.backward(torch.ones(3, 2, device=device), s, t, stats, 1.0)
        for x, grad in zip(s, grads, strict=True):
            if x.shape[2:] != (1, 1):
                assert grad.stride() == x.stride()


@pytest.mark.parametrize("layout", LONG)
def test_channels_longer_than_a_run(layout, device) -> None:
    s, t = (pyramid([LONG[layout]], torch.float32, layout, device, i) for i in (0, 1))
    with trace() as record:
        first, stats = kernels.forward(s, t, 1.0)
    assert record.launches[0].grid[0] == 4  # two groups of channels, two runs
    check(s, t)
    again, stats2 = kernels.forward(s, t, 1.0)
    assert torch.equal(first, again)
    assert torch.equal(stats, stats2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_maxima_that_keep_rising_and_falling(layout, device) -> None:
    """Sums are brought to a new maximum in every step, or in none, over a range that exp does not reach."""
    _, c, h, w = LONG[layout]
    ramp = torch.linspace(-300.0, 300.0, h * w, device=device).view(1, 1, h, w)
    noise = torch.randn(1, c, h, w, generator=torch.Generator().manual_seed(0)).to(device)
    for s, t in ((ramp + noise, ramp - noise), (-ramp, ramp + noise)):
        check(*([x.expand(1, c, h, w).contiguous(memory_format=FORMATS[layout])] for x in (s, t)), tau=0.5)


def test_student_and_teacher_may_differ_in_dtype(device) -> None:
    s = pyramid(SHAPES["odd"], torch.bfloat16, "contiguous", device, 0)
    check(s, pyramid(SHAPES["odd"], torch.float32, "contiguous", device, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_maps_give_zero_and_no_gradient(dtype, device) -> None:
    for layout in ("contiguous", "channels_last"):
        s = pyramid(SHAPES["odd"], dtype, layout, device, 0)
        out, stats = kernels.forward(s, s, 1.0)
        assert torch.equal(out, torch.zeros_like(out))
        for x in kernels.backward(torch.ones_like(out), s, s, stats, 1.0):
            assert torch.equal(x, torch.zeros_like(x))


def test_a_constant_in_a_channel_changes_nothing(device) -> None:
    """Far from zero as well: multiples of 1/64 and 2^17 are added without rounding in float32."""
    s, t = (
        [x.mul(64).round().div(64) for x in pyramid(SHAPES["odd"], torch.float32, "contiguous", device, i)]
        for i in (0, 1)
    )
    want, stats = kernels.forward(s, t, 2.0)
    far = [x + 2.0**17 for x in s], [x - 2.0**17 for x in t]
    out, far_stats = kernels.forward(*far, 2.0)
    assert torch.equal(out, want)
    ones = torch.ones_like(want)
    for a, b in zip(
        kernels.backward(ones, *far, far_stats, 2.0), kernels.backward(ones, s, t, stats, 2.0), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_maps_do_not_overflow(dtype, device) -> None:
    peak = torch.zeros(1, 1, 2, 2, dtype=dtype, device=device)
    peak[..., 0, 0] = 1000.0
    out, stats = kernels.forward([peak], [peak.flip(-1)], 1.0)
    assert out.item() == pytest.approx(1000.0, rel=1e-6)
    grad = kernels.backward(torch.ones_like(out), [peak], [peak.flip(-1)], stats, 1.0)[0]
    assert grad.flatten().tolist() == [1.0, -1.0, 0.0, 0.0]
    lowest = torch.full_like(peak, torch.finfo(dtype).min)  # the lowest number there is, everywhere
    out, stats = kernels.forward([lowest], [lowest], 1.0)
    assert out.item() == 0.0
    check([lowest], [peak.mul(1e-3)])
    check(*(pyramid([(1, 8, 9, 9)], dtype, "contiguous", device, i, scale=400.0) for i in (0, 1)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_what_is_not_finite_is_not_hidden(value, device) -> None:
    maps = [pyramid([(2, 3, 4, 5)], torch.float32, "contiguous", device, i)[0] for i in (0, 1)]
    clean, _ = kernels.forward([maps[0]], [maps[1]], 1.0)
    for side in (0, 1):
        for where in ((1, 2, 0, 3), (1, 2)):
            pair = [x.clone() for x in maps]
            pair[side][where] = value
            out, _ = kernels.forward([pair[0]], [pair[1]], 1.0)
            assert torch.equal(out[0, 0], clean[0, 0])
            assert not bool(out[0, 1].isfinite())


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape, device) -> None:
    x = [torch.zeros(shape, device=device)]
    out, stats = kernels.forward(x, x, 1.0)
    assert torch.equal(out, torch.zeros(1, shape[0], device=device))
    (grad,) = kernels.backward(torch.ones_like(out), x, x, stats, 1.0)
    assert grad.shape == shape
    # an empty level beside one that is not
    y = [x[0], *pyramid([(shape[0], 2, 2, 2)], torch.float32, "contiguous", device, 1)]
    z = [x[0], *pyramid([(shape[0], 2, 2, 2)], torch.float32, "contiguous", device, 2)]
    out, _ = kernels.forward(y, z, 1.0)
    want, _ = reference.forward(y, z, 1.0)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("levels", [1, 5])
@pytest.mark.parametrize("images", [1, 3])
def test_launches_do_not_grow_with_levels_or_images(levels, images) -> None:
    maps = [torch.empty(images, 8, 2**i, 4, device="meta") for i in range(levels)]
    with trace(run=False) as forward:
        out, stats = kernels.forward(maps, maps, 1.0)
    with trace(run=False) as backward:
        kernels.backward(out, maps, maps, stats, 1.0)
    assert forward.names == ["channel_kl_forward", "channel_kl_finish"]
    assert backward.names == ["channel_kl_backward"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(1, 1), (7, 11), (100, 168), (512, 1024), (1, 4097)])
def test_runs_cover_every_position_and_none_is_empty(layout, size) -> None:
    x = torch.empty(1, 19, *size, device="meta", memory_format=FORMATS[layout])
    plan = kernels._Plan([x], [x, x])
    count, step = size[0] * size[1], plan.tile.depth * plan.tile.positions
    runs, steps = ((v[0] - 3) // 2 for v in (plan.sizes[2], plan.sizes[3]))
    assert 1 <= runs <= plan.tile.runs
    assert (runs - 1) * steps * step < count <= runs * steps * step
    assert plan.grid.programs == runs * -(-19 // plan.tile.channels)


@pytest.mark.parametrize("layout", FORMATS.values(), ids=str)
@pytest.mark.parametrize("images", [2, 16])
def test_extra_memory_is_the_gradient_and_little_else(images, layout) -> None:
    shapes = [(images, 256, h, w) for h, w in ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))]
    s = [torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=layout) for shape in shapes]
    with trace(run=False) as record:
        out, stats = kernels.forward(s, s, 1.0)
        kernels.backward(out, s, s, stats, 1.0)
    maps = sum(2 * x.numel() * x.element_size() for x in s)
    assert maps / 2 <= record.bytes <= 0.55 * maps  # performance.md's bound is 1.1 times S and T


def test_operation_by_name_runs_the_kernels(device) -> None:
    s, t = (pyramid(SHAPES["odd"], torch.float32, "contiguous", device, i) for i in (0, 1))
    for a, b in by_name(lambda s, t, backend: channel_kl(s, t, 2.0, backend=backend), s, t, launches=3):
        if not b.any():
            assert torch.equal(a, b)  # of one position
        else:
            assert_gradient(a, b, torch.float32)


def test_an_image_beyond_32_bit_offsets_is_refused_before_any_launch() -> None:
    x = [torch.empty(1, 2, 2**15, 2**15, device="meta")]
    message = r"level 0 has 2147483648 elements; expected fewer than 2\*\*31 an image"
    with trace(run=False) as record, pytest.raises(ValueError, match=message):
        kernels.forward(x, x, 1.0)
    assert record.launches == []
