"""The kernel that applies packed perturbations against the reference: views, bits, dtypes, layouts, one launch.

Both compute the same float32 sums without fusing them, so float32 results are equal. A normalisation is the reciprocal's
product corrected by its remainder: one unit in the last place, 2^-23 of values up to 3 (the interpreter does not fuse
the correction: two). A cast to half types rounds to nearest on a GPU and cuts off in the interpreter: one unit in the
last place of the half type.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import CellMap, DeltaCodes, apply_delta
from ikd_fast.kernels.triton_ops.launch import trace
from tests.kernels.cell_maps import Axis, all_maps, cell_map

pytestmark = pytest.mark.usefixtures("poison")

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
UNITS = {
    "grey_level": [1 / s for s in STD],
    "low": [-m / s for m, s in zip(MEAN, STD, strict=True)],
    "high": [(255 - m) / s for m, s in zip(MEAN, STD, strict=True)],
}
NORMALIZE = {"mean": MEAN, "std": STD}
UNIT = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
FRAMES = {"odd": (13, 21), "aligned": (19, 72)}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def records(codes: DeltaCodes, maps: list[CellMap], device, channels: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [
        codes.pack(torch.randint(codes.levels, (channels, *m.cells), dtype=torch.uint8, generator=g)).to(
            device
        )
        for m in maps
    ]


def images(n: int, frame, dtype, device, layout: str = "contiguous") -> Tensor:
    g = torch.Generator().manual_seed(2)
    if dtype == torch.uint8:
        x = torch.randint(256, (n, 3, *frame), dtype=dtype, generator=g)
    else:
        x = (1.5 * torch.randn(n, 3, *frame, generator=g)).to(dtype)
    if layout == "strided":
        return torch.stack([x, x.flip(0)], -1).to(device)[..., 0]
    if layout == "turned":
        return x.transpose(2, 3).contiguous().to(device).transpose(2, 3)
    return x.to(device).contiguous(memory_format=FORMATS[layout])


def both(given, *args, **options) -> tuple[Tensor, Tensor]:
    kernel, reference = (apply_delta(given, *args, **options, backend=b) for b in ("triton", "reference"))
    pairs = zip(kernel, reference, strict=True) if options.get("clean") else [(kernel, reference)]
    for a, b in pairs:
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert not a.isnan().any()
    if options.get("clean"):
        kernel, reference = torch.cat(kernel), torch.cat(reference)
    return kernel.cpu(), reference.cpu()


def assert_near(kernel: Tensor, reference: Tensor) -> None:
    bound = UNIT[kernel.dtype] * reference.double().abs() + 2.0**-22
    assert ((kernel.double() - reference.double()).abs() <= bound).all()


@pytest.mark.parametrize(
    ("bits", "layout"), [(2, "contiguous"), (4, "contiguous"), (4, "channels_last"), (8, "contiguous")]
)
def test_every_view_of_floats(device, bits, layout) -> None:
    maps, codes = all_maps(), DeltaCodes.of(8, 10, bits)
    given = images(len(maps), FRAMES["odd"], torch.float32, device, layout)
    kernel, reference = both(given, records(codes, maps, device), maps, codes, **UNITS)
    assert torch.equal(kernel, reference)
    assert (kernel != given.cpu()).double().mean() > 0.3


@pytest.mark.parametrize("layout", list(FORMATS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types(device, dtype, layout) -> None:
    maps, codes = all_maps(FRAMES["aligned"])[2:11:4], DeltaCodes.of(8, 2)
    given = images(len(maps), FRAMES["aligned"], dtype, device, layout)
    assert_near(*both(given, records(codes, maps, device), maps, codes, **UNITS))


@pytest.mark.parametrize("frame", list(FRAMES))
@pytest.mark.parametrize("layout", list(FORMATS))
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_pixels(device, dtype, layout, frame) -> None:
    maps, codes = all_maps(FRAMES[frame])[1:10:4], DeltaCodes.of(8, 2)
    given = images(len(maps), FRAMES[frame], torch.uint8, device, layout)
    packed = records(codes, maps, device)
    assert_near(*both(given, packed, maps, codes, **NORMALIZE, dtype=dtype, clean=True))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pixels_without_a_normalisation(device, bits) -> None:
    maps, codes = all_maps()[4:11:2], DeltaCodes.of(8, 8, bits)
    given = images(len(maps), FRAMES["odd"], torch.uint8, device)
    kernel, reference = both(given, records(codes, maps, device), maps, codes)
    assert torch.equal(kernel, reference)
    assert kernel.max() == 255


def test_other_strides_are_copied(device) -> None:
    maps, codes = all_maps()[:3], DeltaCodes.of(8, 2)
    for layout in ("strided", "turned"):
        given = images(3, FRAMES["odd"], torch.float32, device, layout)
        kernel, reference = both(given, records(codes, maps, device), maps, codes, **UNITS)
        assert kernel.is_contiguous()
        assert torch.equal(kernel, reference)


@pytest.mark.parametrize("layout", list(FORMATS))
def test_wider_than_a_tile_and_one_channel(device, layout) -> None:
    frame, codes = (17, 140), DeltaCodes.of(8, 2)
    view = cell_map((Axis(17, 17), Axis(151, 139, scale=-1, offset=145)), frame)
    for channels in (1, 4):
        x = torch.randn(1, channels, *frame, generator=torch.Generator().manual_seed(0)).to(device)
        x = x.contiguous(memory_format=FORMATS[layout])
        units = {"grey_level": [0.01] * channels, "low": [-1.0] * channels, "high": [1.0] * channels}
        kernel, reference = both(x, records(codes, [view], device, channels), [view], codes, **units)
        assert torch.equal(kernel, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_is_untouched_bit_for_bit(device, dtype) -> None:
    view, codes = all_maps()[1], DeltaCodes.of(8, 2)
    given = images(1, FRAMES["odd"], dtype, device)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e4], dtype=dtype, device=device)
    given[..., 9:, :5] = odd
    got = apply_delta(given, records(codes, [view], device), [view], codes, **UNITS, backend="triton")
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(got[..., 9:, :].contiguous().view(bits), given[..., 9:, :].contiguous().view(bits))


def test_nan_and_values_beyond_the_range_are_the_references(device) -> None:
    view, codes = all_maps()[0], DeltaCodes.of(8, 2)
    given = images(1, FRAMES["odd"], torch.float32, device)
    given[0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 50.0], device=device)
    packed = records(codes, [view], device)
    kernel, reference = (
        apply_delta(given, packed, [view], codes, **UNITS, backend=b).cpu() for b in ("triton", "reference")
    )
    assert torch.equal(kernel.nan_to_num(nan=77.0), reference.nan_to_num(nan=77.0))
    assert kernel[0, 0, 0, 0].isnan()


def test_one_launch_whatever_the_batch(device) -> None:
    codes, frame = DeltaCodes.of(8, 2), FRAMES["odd"]
    for count in (1, 3):
        maps = all_maps()[:count]
        given, packed = images(count, frame, torch.uint8, device), records(codes, maps, device)
        with trace() as record:
            out, clean = apply_delta(given, packed, maps, codes, **NORMALIZE, clean=True, backend="triton")
        assert record.names == ["apply_delta_forward"]
        tables = count * 8 * 8 + 4 * (3 * 6 + count * sum(frame))  # rows of numbers; channels and cells
        assert record.bytes == out.untyped_storage().nbytes() + clean.untyped_storage().nbytes() + tables


def test_repeats_are_equal_and_rows_do_not_depend_on_the_batch(device) -> None:
    maps, codes = all_maps()[3:8], DeltaCodes.of(8, 2)
    given, packed = images(len(maps), FRAMES["odd"], torch.float32, device), records(codes, maps, device)
    first, again = (apply_delta(given, packed, maps, codes, **UNITS, backend="triton") for _ in range(2))
    assert torch.equal(first, again)
    order = [4, 2, 0]
    pick = lambda values: [values[i] for i in order]  # noqa: E731
    assert torch.equal(
        apply_delta(given[order], pick(packed), pick(maps), codes, **UNITS, backend="triton"), first[order]
    )


def test_errors_come_before_a_launch(device) -> None:
    maps, codes = all_maps()[:1], DeltaCodes.of(8, 2)
    given, packed = images(1, FRAMES["odd"], torch.float32, device), records(codes, maps, device)
    with trace() as record:
        with pytest.raises(ValueError, match=r"records\[0\]: expected contiguous uint8"):
            apply_delta(given, [packed[0][1:]], maps, codes, **UNITS, backend="triton")
        with pytest.raises(
            TypeError, match=r"expected fp16, bf16 or fp32 for backend='triton', got torch\.float64"
        ):
            apply_delta(given.double(), packed, maps, codes, **UNITS, backend="triton")
        big = torch.empty(1, 3, 40000, 40000, device="meta")
        one = cell_map((Axis(1, 1), Axis(1, 1)), (1, 1))
        wide = torch.zeros(40000, dtype=torch.int32)
        view = CellMap((1, 1), wide, wide, one.x_span, one.y_span)
        with pytest.raises(
            ValueError, match=r"an image has 4800000000 elements; expected fewer than 2\*\*31"
        ):
            apply_delta(big, records(codes, [view], "meta"), [view], codes, **UNITS, backend="triton")
    assert record.launches == []
    assert record.bytes == 0
