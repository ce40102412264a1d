"""The kernels of attention_stats against the float64 reference: dtypes, layouts, odd sizes, launches, bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import attention_stats
from ikd_fast.kernels.reference import attention_stats as reference
from ikd_fast.kernels.triton_ops import attention_stats as kernels
from ikd_fast.kernels.triton_ops.launch import trace
from tests.kernels.layouts import in_layout
from tests.tolerances import assert_gradient, assert_value

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "one": [(1, 1, 1, 1)],
    "odd": [(2, 3, 5, 7), (2, 17, 3, 3), (2, 5, 1, 1)],
    "aligned": [(1, 24, 8, 20), (1, 72, 2, 4)],
    "long": [(1, 2, 65, 65)],  # 34 blocks of 128 positions: the finishing launch loops
}
BOTH = (True, True)


def pyramid(shapes, dtype, layout: str, device, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for n, c, h, w in shapes:
        x = torch.randn(n, c, h, w, generator=g).to(device, dtype)
        out.append(in_layout(x, layout))
    return out


def upstream(rows, seed: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=g).to(x.device) for x in rows]


def check(maps, p=1.0, positive=False, which=BOTH, has=(True,) * 4) -> None:
    rows = kernels.forward(maps, p, positive, *which)
    wide = [x.double() for x in maps]
    wanted = reference.forward(wide, p, positive, *which)
    for a, b in zip(rows, wanted, strict=True):
        assert a.shape == b.shape
        if a.numel():
            assert_value(a, b, maps[0].dtype)
    shown = [keep and g.numel() > 0 for keep, g in zip(has, rows, strict=True)]
    grads = [g if keep else None for keep, g in zip(shown, upstream(rows), strict=True)]
    got = kernels.backward(*grads, maps, p, positive)
    want = reference.backward(*(None if g is None else g.double() for g in grads), wide, p, positive)
    for x, a, b in zip(maps, got, want, strict=True):
        assert a.dtype == x.dtype
        assert_gradient(a, b, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", ["one", "odd", "aligned"])
def test_contiguous(shapes, dtype, device) -> None:
    check(pyramid(SHAPES[shapes], dtype, "contiguous", device))


def test_more_blocks_than_are_added_at_once(device) -> None:
    check(pyramid(SHAPES["long"], torch.float32, "contiguous", device))


@pytest.mark.parametrize("layout", ["channels_last", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shapes", ["odd", "aligned"])
def test_layouts(shapes, dtype, layout, device) -> None:
    maps = pyramid(SHAPES[shapes], dtype, layout, device)
    check(maps)
    with trace(run=False):  # strides alone
        grads = kernels.backward(torch.empty(1, device=device), None, None, None, maps, 1.0, False)
    for x, grad in zip(maps, grads, strict=True):
        assert grad.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("p", "positive"), [(1.0, True), (2.0, False), (2.0, True), (3.5, False), (1.5, True)]
)
def test_powers(p, positive, layout, device) -> None:
    check(pyramid(SHAPES["odd"][:1], torch.float32, layout, device), p, positive)


@pytest.mark.parametrize("which", [(True, False), (False, True)], ids=["over channels", "over positions"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_one_direction_alone(which, layout, device) -> None:
    check(pyramid(SHAPES["odd"][:2], torch.float32, layout, device), which=which)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 5, 10, 7, 11])
def test_any_of_the_four_gradients_may_be_missing(bits, device) -> None:
    has = tuple(bool(bits >> i & 1) for i in range(4))
    check(pyramid(SHAPES["odd"][:1], torch.float32, "contiguous", device), has=has)


def test_no_gradient_at_all_is_zero(device) -> None:
    maps = pyramid(SHAPES["odd"], torch.float16, "contiguous", device)
    for x, grad in zip(maps, kernels.backward(None, None, None, None, maps, 1.0, False), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape, device) -> None:
    n = shape[0]
    maps = [torch.zeros(shape, device=device), torch.ones(n, 2, 2, 2, device=device)]
    rows = kernels.forward(maps, 1.0, False, *BOTH)
    for a, b in zip(rows, reference.forward(maps, 1.0, False, *BOTH), strict=True):
        assert torch.equal(a, b)
    grads = kernels.backward(*(torch.ones_like(r) for r in rows), maps, 1.0, False)
    assert grads[0].shape == shape
    assert torch.equal(grads[1], torch.full((n, 2, 2, 2), 1.5, device=device))  # 2 (1 / 2 + 1 / 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("p", "positive"), [(1.0, False), (1.0, True), (2.0, True), (2.5, False)])
def test_what_is_not_finite_shows(p, positive, bad, device) -> None:
    x = torch.ones(1, 2, 2, 2, device=device)
    x[0, 0, 0, 0] = bad
    rows = kernels.forward([x], p, positive, *BOTH)
    for a, b in zip(rows, reference.forward([x], p, positive, *BOTH), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True)


def test_large_half_maps_do_not_overflow(device) -> None:
    x = torch.full((1, 64, 4, 4), 1e4, dtype=torch.float16, device=device)
    rows = kernels.forward([x], 2.0, False, *BOTH)
    assert_value(rows[0], torch.full((16,), 1e8, device=device), torch.float16)
    assert_value(rows[2], torch.full((64,), 1e8, device=device), torch.float16)


@pytest.mark.parametrize("levels", [1, 5])
@pytest.mark.parametrize("images", [1, 3])
def test_launches_do_not_grow_with_levels_or_images(levels, images) -> None:
    maps = [torch.empty(images, 8, 2**i, 4, device="meta") for i in range(levels)]
    with trace(run=False) as forward:
        rows = kernels.forward(maps, 1.0, False, *BOTH)
    with trace(run=False) as spatial:
        kernels.forward(maps, 1.0, False, True, False)
    with trace(run=False) as backward:
        kernels.backward(*rows, maps, 1.0, False)
    assert forward.names == ["attention_stats_forward", "attention_stats_finish"]
    assert spatial.names == ["attention_stats_forward"]
    assert backward.names == ["attention_stats_backward"]


@pytest.mark.parametrize("images", [2, 16])
def test_extra_memory_is_the_gradient_and_little_else(images) -> None:
    shapes = [(images, 256, h, w) for h, w in ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))]
    maps = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    with trace(run=False) as record:
        kernels.backward(*kernels.forward(maps, 1.0, False, *BOTH), maps, 1.0, False)
    gradient = sum(x.numel() * x.element_size() for x in maps)
    # Partial sums: 8 bytes for every 128 positions of 2 bytes; the means themselves are less.
    assert gradient <= record.bytes <= 1.06 * gradient


@pytest.mark.parametrize("over", ["both", "channels", "positions"])
def test_operation_by_name_runs_the_kernels(over, device) -> None:
    maps = pyramid(SHAPES["odd"], torch.float32, "contiguous", device)
    results = []
    for backend in ("triton", "reference"):
        mine = [x.clone().requires_grad_() for x in maps]
        with trace() as record:
            stats = attention_stats(mine, p=2, over=over, backend=backend)
            total = sum((y * y).sum() for kind in stats for y in kind)
            grads = torch.autograd.grad(total, mine)
        wanted = 2 if over == "channels" else 3
        assert len(record.launches) == (wanted if backend == "triton" else 0)
        results.append((total.detach(), *grads))
    for a, b in zip(*results, strict=True):
        assert_gradient(a, b, torch.float32)


def test_means_of_x_alone_read_no_map_on_the_way_back(device) -> None:
    maps = [x.requires_grad_() for x in pyramid(SHAPES["odd"], torch.float32, "contiguous", device)]
    with trace() as record:
        stats = attention_stats(maps, backend="triton")
        total = sum(x.sum() for x in (*stats.spatial_mean, *stats.channel_mean))
        grads = torch.autograd.grad(total, maps)
    assert record.launches[-1].meta["HAS"] == 2 | 8
    for x, grad in zip(maps, grads, strict=True):
        want = torch.full_like(grad, 1 / x.shape[1] + 1 / (x.shape[2] * x.shape[3]))
        assert_gradient(grad, want, torch.float32)


def test_repeats_give_the_same_bits(device) -> None:
    maps = pyramid(SHAPES["long"], torch.float32, "contiguous", device)
    first, second = (kernels.forward(maps, 1.0, False, *BOTH) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_image_beyond_32_bit_offsets_is_refused_before_any_launch() -> None:
    x = [torch.empty(1, 2, 2**15, 2**15, device="meta")]
    with trace(run=False) as record, pytest.raises(ValueError, match=r"expected fewer than 2\*\*31 an image"):
        kernels.forward(x, 1.0, False, *BOTH)
    assert record.launches == []
