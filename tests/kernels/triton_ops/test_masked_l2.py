"""The mask kernel against keyed_mask, bit for bit: dtypes, layouts, odd sizes, keys, launches, bytes, compilations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import keyed_mask, mask_maps
from ikd_fast.kernels.triton_ops import masked_l2 as kernels
from ikd_fast.kernels.triton_ops.launch import trace
from tests.kernels.layouts import in_layout

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "one": [(1, 1, 1, 1)],
    "odd": [(2, 3, 5, 7), (2, 7, 3, 3), (2, 5, 1, 1)],
    "mixed": [(2, 8, 8, 10), (2, 8, 5, 6), (2, 3, 4, 4)],  # aligned and not, in either dense layout
    "long": [(1, 35, 23, 31)],  # two blocks of 512 positions and two groups of 32 channels
    "wide": [(1, 260, 6, 6)],  # two groups of 256 channels and two blocks of 32 positions, channels_last
    "column": [(1, 2, 37, 1), (1, 2, 1, 37)],
}
IDS, LEVELS = [(1 << 64) - 3, 5], [2, 0, 7]
KEY = {"seed": (7 << 32) + 1, "epoch": 9, "ratio": 0.65}


def pyramid(shapes, dtype, layout: str, device) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    out = []
    for n, c, h, w in shapes:
        # bf16 numbers in every dtype: no conversion rounds, so that all comparisons are of bits
        x = torch.randn(n, c, h, w, generator=g).bfloat16().to(device, dtype)
        out.append(in_layout(x, layout))
    return out


def check(maps: list[Tensor], dtype: torch.dtype, **changes) -> None:
    ids, levels, key = IDS[: len(maps[0])], LEVELS[: len(maps)], {**KEY, **changes}
    out = kernels.mask(maps, dtype, ids, levels, **key)
    for x, y, level in zip(maps, out, levels, strict=True):
        keep = keyed_mask(ids, *x.shape[2:], level=level, device=x.device, **key)
        assert y.dtype == dtype
        assert torch.equal(y, (x.float() * keep).to(dtype))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", ["odd", "mixed"])
def test_both_directions(shapes, dtype, layout, device) -> None:
    check(pyramid(SHAPES[shapes], dtype, layout, device), torch.float32)
    check(pyramid(SHAPES[shapes], torch.float32, layout, device), dtype)


@pytest.mark.parametrize(
    ("shapes", "layout"),
    [
        ("one", "contiguous"),
        ("long", "contiguous"),
        ("long", "strided"),
        ("wide", "channels_last"),
        ("column", "contiguous"),
        ("column", "channels_last"),
        ("column", "strided"),
    ],
)
def test_sizes(shapes, layout, device) -> None:
    check(pyramid(SHAPES[shapes], torch.bfloat16, layout, device), torch.float32)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.3])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), ((1 << 64) - 1, (1 << 32) - 1)])
def test_ends_of_the_keys_and_the_ratio(ratio, seed, epoch, device) -> None:
    maps = [torch.ones(2, 1, 9, 12, device=device)]
    check(maps, torch.float32, ratio=ratio, seed=seed, epoch=epoch)


def test_layouts_may_differ_within_a_pyramid_and_are_kept(device) -> None:
    shapes = SHAPES["mixed"]
    rows, last, any_ = (
        pyramid(shapes, torch.bfloat16, x, device) for x in ("contiguous", "channels_last", "strided")
    )
    maps = [rows[0], last[1], any_[2]]
    check(maps, torch.float32)
    out = kernels.mask(maps, torch.float32, IDS, LEVELS, **KEY)
    assert [x.stride() for x in out[:2]] == [x.stride() for x in maps[:2]]
    expanded = [torch.ones((), device=device).expand(2, 3, 4, 5)]  # the gradient of a sum
    check(expanded, torch.bfloat16)


def test_pointers_that_are_not_16_byte_aligned(device) -> None:
    flat = torch.randn(1 + 2 * 8 * 4 * 4, device=device).bfloat16().float()
    check([flat[1:].view(2, 8, 4, 4)], torch.float32)


def test_an_image_has_the_same_mask_in_every_batch(device) -> None:
    maps = pyramid([(3, 4, 6, 5), (3, 4, 3, 3)], torch.float32, "contiguous", device)
    whole = kernels.mask(maps, torch.float32, [5, 6, 7], [0, 1], **KEY)
    for i, image in enumerate([5, 6, 7]):
        alone = kernels.mask([x[i : i + 1] for x in maps], torch.float32, [image], [0, 1], **KEY)
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)], ids=str)
def test_empty(shape, device) -> None:
    x = torch.zeros(shape, device=device)
    with trace() as record:
        (out,) = kernels.mask([x], torch.float32, list(range(shape[0])), [0], **KEY)
    assert out.shape == shape
    assert record.launches == []
    if shape[0]:  # an empty level between two that are not
        y = torch.ones(shape[0], 2, 3, 3, device=device)
        check([y, x, y], torch.float32)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter computes with NumPy
def test_nan_and_infinity_at_a_masked_position_give_nan(device) -> None:
    x = torch.full((1, 2, 8, 8), float("inf"), dtype=torch.float16, device=device)
    x[:, 1] = float("nan")
    (out,) = kernels.mask([x], torch.float32, [5], [0], **KEY)
    keep = keyed_mask([5], 8, 8, device=device, **KEY)[0, 0] == 1
    assert torch.equal(out[0, 0].isinf(), keep)
    assert torch.equal(out[0, 0].isnan(), ~keep)
    assert bool(out[0, 1].isnan().all())
    # beyond fp16, kept: infinity; masked: zero
    (grad,) = kernels.mask([torch.full((1, 1, 8, 8), 1e5, device=device)], torch.float16, [5], [0], **KEY)
    assert torch.equal(grad[0, 0].isinf(), keep)
    assert not bool(grad[0, 0][~keep].any())


@pytest.mark.parametrize("levels", [1, 5])
@pytest.mark.parametrize("images", [1, 16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_one_launch_and_nothing_allocated_but_the_output(levels, images, layout) -> None:
    shapes = [(images, 256, 100 >> i, 168 >> i) for i in range(levels)]
    maps = [torch.empty(s, dtype=torch.bfloat16, device="meta", memory_format=layout) for s in shapes]
    for dtype in (torch.float32, torch.bfloat16):  # forward; backward is the same from float32 on
        with trace(run=False) as record:
            out = kernels.mask(maps, dtype, list(range(images)), list(range(levels)), **KEY)
        assert record.names == ["masked_pyramid"]
        made = sum(x.numel() * x.element_size() for x in out)
        assert record.bytes == made + 40 * levels * images  # the keys: five int64 an image and level


def test_the_launch_says_nothing_of_the_sizes_to_the_compiler(device) -> None:
    """A 1 or a multiple of 16 among the integers would be another compilation, so none may be there."""
    for shapes in ([(2, 16, 32, 1), (2, 1, 1, 16)], [(2, 5, 7, 9), (2, 3, 2, 2)]):
        with trace() as record:
            kernels.mask(
                pyramid(shapes, torch.float32, "contiguous", device), torch.float32, IDS, [0, 1], **KEY
            )
        numbers = [v for group in record.launches[0].args if isinstance(group, tuple) for v in group]
        numbers = [v for v in numbers if isinstance(v, int)]
        assert len(numbers) == 10
        assert all(v != 1 and v % 16 for v in numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operation_by_name_runs_the_kernel(dtype, device) -> None:
    maps = pyramid(SHAPES["odd"], dtype, "contiguous", device)
    results = []
    for backend in ("triton", "reference"):
        mine = [x.clone().requires_grad_() for x in maps]
        with trace() as record:
            out = mask_maps(mine, IDS, levels=LEVELS, backend=backend, **KEY)
            upstream = pyramid(SHAPES["odd"], torch.float32, "channels_last", device)
            grads = torch.autograd.grad(out, mine, upstream)
        assert len(record.launches) == (2 if backend == "triton" else 0)
        results.append([*(x.detach() for x in out), *grads])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_an_image_beyond_32_bit_offsets_is_refused_before_any_launch() -> None:
    x = [torch.empty(1, 2, 2**15, 2**15, device="meta")]
    with (
        trace(run=False) as record,
        pytest.raises(ValueError, match=r"level 0 has 2147483648 elements; expected fewer than 2\*\*31 an"),
    ):
        mask_maps(x, [1], ratio=0.5, seed=0, epoch=0, backend="triton")
    assert record.launches == []
    assert record.bytes == 0
