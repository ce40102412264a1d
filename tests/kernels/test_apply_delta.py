"""Packed perturbations applied to images against a loop over pixels in float64.

Float32 results differ from it by the rounding of the value, its product with a grey level, and the sum: a few units of
2^-24 of numbers below 8. Half types add half a unit of their own.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import CellMap, DeltaCodes, apply_delta
from ikd_fast.kernels.ops import apply_delta as op
from tests.kernels.cell_maps import VIEWS, Axis, all_maps, cell_map

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
UNITS = {
    "grey_level": [1 / s for s in STD],
    "low": [-m / s for m, s in zip(MEAN, STD, strict=True)],
    "high": [(255 - m) / s for m, s in zip(MEAN, STD, strict=True)],
}
HALF_UNIT = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
FRAME = (13, 21)


def codes_of(bits: int) -> DeltaCodes:
    return DeltaCodes.of(8, 10, bits)


def records(codes: DeltaCodes, maps: list[CellMap], channels: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [
        codes.pack(torch.randint(codes.levels, (channels, *m.cells), dtype=torch.uint8, generator=g))
        for m in maps
    ]


def floats(n: int, dtype: torch.dtype, frame=FRAME) -> Tensor:
    """Normalised images; some values lie beyond black and white."""
    x = torch.randn(n, 3, *frame, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (1.5 * x).to(dtype)


def pixels(n: int, frame=FRAME) -> Tensor:
    g = torch.Generator().manual_seed(3)
    x = torch.randint(256, (n, 3, *frame), dtype=torch.uint8, generator=g)
    return torch.where(torch.rand(x.shape, generator=g) < 0.2, x // 64 * 85, x)  # some near 0 and 255


def values(
    codes: DeltaCodes, packed: list[Tensor], maps: list[CellMap]
) -> list[list[list[list[float | None]]]]:
    """Grey levels at [n][c][y][x] of the frame, None without a cell; bytes are taken apart here by hand."""
    out = []
    for record, view in zip(packed, maps, strict=True):
        bytes_, (height, width) = record.tolist(), view.cells
        pitch = math.ceil(width * codes.bits / 8)

        def at(c: int, y: int, x: int, bytes_=bytes_, height=height, pitch=pitch) -> float | None:
            if x < 0 or y < 0:
                return None
            bit = x * codes.bits
            byte = bytes_[(c * height + y) * pitch + bit // 8]
            return ((byte >> bit % 8) % 2**codes.bits - codes.levels // 2) * codes.spacing

        ys, xs = view.y_cell.tolist(), view.x_cell.tolist()
        out.append([[[at(c, y, x) for x in xs] for y in ys] for c in range(3)])
    return out


def expected_floats(images: Tensor, codes: DeltaCodes, packed: list[Tensor], maps: list[CellMap]) -> Tensor:
    out = images.double().tolist()
    for n, channels in enumerate(values(codes, packed, maps)):
        for c, rows in enumerate(channels):
            grey, low, high = (UNITS[k][c] for k in ("grey_level", "low", "high"))
            for y, row in enumerate(rows):
                for x, value in enumerate(row):
                    if value is not None:
                        b = out[n][c][y][x]
                        out[n][c][y][x] = min(max(b + grey * value, min(low, b)), max(high, b))
    return torch.tensor(out, dtype=torch.float64)


def expected_pixels(
    images: Tensor, codes: DeltaCodes, packed: list[Tensor], maps: list[CellMap]
) -> tuple[Tensor, Tensor]:
    moved, plain = (
        torch.zeros(images.shape, dtype=torch.float64),
        torch.zeros(images.shape, dtype=torch.float64),
    )
    given = images.tolist()
    for n, channels in enumerate(values(codes, packed, maps)):
        for c, rows in enumerate(channels):
            for y, row in enumerate(rows):
                for x, value in enumerate(row):
                    if value is not None:
                        b = given[n][c][y][x]
                        plain[n, c, y, x] = (b - MEAN[c]) / STD[c]
                        moved[n, c, y, x] = (min(max(b + value, 0.0), 255.0) - MEAN[c]) / STD[c]
    return moved, plain


def assert_close(got: Tensor, expected: Tensor) -> None:
    bound = 2.0**-20 + HALF_UNIT[got.dtype] * expected.abs()
    assert ((got.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_view_of_float_images(bits) -> None:
    maps, codes = all_maps(), codes_of(bits)
    packed = records(codes, maps)
    for dtype in HALF_UNIT:
        images = floats(len(maps), dtype)
        got = apply_delta(images, packed, maps, codes, **UNITS)
        assert got.dtype == dtype
        assert_close(got, expected_floats(images, codes, packed, maps))
        if dtype == torch.float64:
            assert (got - expected_floats(images, codes, packed, maps)).abs().max() < 1e-14


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_view_of_pixels(bits) -> None:
    maps, codes = all_maps(), codes_of(bits)
    packed, images = records(codes, maps), pixels(len(maps))
    moved, plain = expected_pixels(images, codes, packed, maps)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        options = dict(mean=MEAN, std=STD, dtype=dtype)
        got, clean = apply_delta(images, packed, maps, codes, **options, clean=True)
        assert got.dtype == clean.dtype == dtype
        assert_close(got, moved)
        assert_close(clean, plain)
        assert torch.equal(apply_delta(images, packed, maps, codes, **options), got)
    assert moved.abs().max() > 0
    assert (moved != plain).double().mean() > 0.3


def test_pixels_stay_pixels_without_a_normalisation() -> None:
    maps, codes = all_maps()[:2], DeltaCodes.of(8, 2)
    packed, images = records(codes, maps), pixels(2)
    got = apply_delta(images, packed, maps, codes)
    moved, _ = expected_pixels(images, codes, packed, maps)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    inside = (maps[1].y_cell >= 0)[:, None] & (maps[1].x_cell >= 0)
    assert torch.equal(got[0].double(), (moved[0] * std + mean).round())
    assert torch.equal(got[1].double(), torch.where(inside, (moved[1] * std + mean).round(), 0.0))
    assert got.min() == 0
    assert got.max() == 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_padding_is_untouched_bit_for_bit(dtype) -> None:
    maps, codes = [cell_map(VIEWS["padded"])], DeltaCodes.of(8, 2)
    images = floats(1, dtype)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e4], dtype=dtype)
    images[..., 9:, :5] = odd
    images[..., 17:21] = odd[:4]
    got = apply_delta(images, records(codes, maps), maps, codes, **UNITS)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for part in (slice(9, 13), slice(0, 21)), (slice(0, 13), slice(17, 21)):
        assert torch.equal(got[(..., *part)].view(bits), images[(..., *part)].view(bits))
    assert not torch.equal(got[..., :9, :17], images[..., :9, :17])


def test_a_hole_between_pixels_is_left_alone() -> None:
    """Maps of the library have none; a table may."""
    y, x = torch.tensor([0, -1, 1], dtype=torch.int32), torch.tensor([0, -1, 2, 1], dtype=torch.int32)
    view = CellMap((2, 3), x, y, torch.zeros(3, 2, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32))
    codes = DeltaCodes.of(8, 2)
    packed = records(codes, [view])
    images = floats(1, torch.float32, (3, 4))
    assert_close(
        apply_delta(images, packed, [view], codes, **UNITS), expected_floats(images, codes, packed, [view])
    )
    given = pixels(1, (3, 4))
    got = apply_delta(given, packed, [view], codes, mean=MEAN, std=STD, clean=True)
    for a, b in zip(got, expected_pixels(given, codes, packed, [view]), strict=True):
        assert_close(a, b)


def test_memory_formats_and_the_input_stays() -> None:
    maps, codes = all_maps(), DeltaCodes.of(8, 2)
    packed = records(codes, maps)
    for images, options in (
        (floats(len(maps), torch.float32), UNITS),
        (pixels(len(maps)), {"mean": MEAN, "std": STD}),
    ):
        before, want = images.clone(), apply_delta(images, packed, maps, codes, **options)
        last = apply_delta(
            images.contiguous(memory_format=torch.channels_last), packed, maps, codes, **options
        )
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(last, want)
        wide = torch.stack([images, images.flip(0)], -1)[..., 0]
        assert torch.equal(apply_delta(wide, packed, maps, codes, **options), want)
        assert torch.equal(images, before)
        one = apply_delta(images[3:4], packed[3:4], maps[3:4], codes, **options)
        assert torch.equal(one, want[3:4])


def test_other_channels_and_no_images() -> None:
    view, codes = cell_map(VIEWS["mirrored"]), DeltaCodes.of(8, 2)
    images = floats(1, torch.float32)[:, :1].contiguous()
    record = records(codes, [view], channels=1)
    units = {k: v[:1] for k, v in UNITS.items()}
    got = apply_delta(images, record, [view], codes, **units)
    columns = view.x_cell.clamp(min=0).long()
    delta = codes.decode(codes.unpack(record[0], (1, *view.cells)))[:, :, columns] * (view.x_cell >= 0)
    bounds = images.clamp(max=units["low"][0]), images.clamp(min=units["high"][0])
    want = (images.double() + units["grey_level"][0] * delta).clamp(*(b.double() for b in bounds))
    assert_close(got, want)
    assert apply_delta(images[:0], [], [], codes, **units).shape == (0, 1, *FRAME)


def test_opcheck() -> None:
    maps, codes = all_maps()[:4], DeltaCodes.of(8, 2)
    tables = [n for m in maps for n in m.cells], [m.x_cell for m in maps], [m.y_cell for m in maps]
    numbers = codes.bits, codes.levels, codes.spacing
    for images, units, dtype, clean in (
        (floats(4, torch.bfloat16), (*UNITS.values(), [], []), torch.bfloat16, False),
        (pixels(4), ([], [], [], list(MEAN), list(STD)), torch.float16, True),
    ):
        args = (images, records(codes, maps), *tables, *numbers, *units, dtype, clean, "auto")
        torch.library.opcheck(op._op, args)


def test_compiled_equals_eager() -> None:
    maps, codes = all_maps()[:3], DeltaCodes.of(8, 2)
    packed = records(codes, maps)

    def function(images, packed):
        if images.dtype == torch.uint8:
            a, b = apply_delta(images, packed, maps, codes, mean=MEAN, std=STD, clean=True)
            return a * 2 - b
        return apply_delta(images, packed, maps, codes, **UNITS) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for images in (floats(3, torch.float32), pixels(3)):
        assert torch.equal(compiled(images, packed), function(images, packed))


def _input(**change) -> dict:
    codes = DeltaCodes.of(8, 2)
    view = cell_map((Axis(4, 4), Axis(5, 5)), (4, 6))
    record = torch.zeros(codes.nbytes(3, 4, 5), dtype=torch.uint8)
    images = torch.zeros(1, 3, 4, 6)
    return {"images": images, "records": [record], "maps": [view], "codes": codes, **UNITS, **change}


BYTES = torch.zeros(1, 3, 4, 6, dtype=torch.uint8)
NO_UNITS = dict.fromkeys(UNITS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 4, 6)}, r"images: expected \[N, C, H, W\], got \[3, 4, 6\]"),
        ({"images": torch.zeros(1, 3, 4, 6).long()}, r"images: expected uint8, float16, .*got torch\.int64"),
        ({"images": torch.zeros(1, 3, 4, 6, requires_grad=True)}, r"requires a gradient.*images\.detach\(\)"),
        ({"maps": []}, r"a record and a map for each of 1 images, got 1 records and 0 maps"),
        (
            {"images": torch.zeros(1, 3, 4, 7)},
            r"maps\[0\]: expected a map onto the frame \(4, 7\) \(H, W\), got \(4, 6\)",
        ),
        (
            {"records": [torch.zeros(35, dtype=torch.uint8)]},
            r"records\[0\]: expected contiguous uint8 \[36\] for 3x4x5 cells of 4 bits, got torch\.uint8 \[35\]",
        ),
        ({"records": [torch.zeros(36)]}, r"records\[0\]: .*got torch\.float32 \[36\]"),
        (
            {"records": [torch.zeros(36, dtype=torch.uint8, device="meta")]},
            r"records\[0\]: expected cpu as the images, got meta",
        ),
        ({"grey_level": None}, r"float images need grey_level, one number for each of 3 channels"),
        ({"low": [0.0]}, r"low: expected a finite number for each of 3 channels, got \(0\.0,\)"),
        ({"high": [0.0, 1.0, float("nan")]}, r"high: expected a finite number .*nan"),
        ({"high": [-9.0] * 3}, r"expected low <= high in every channel"),
        ({"grey_level": [1.0, 1.0, 0.0]}, r"grey_level: expected numbers > 0"),
        ({"mean": MEAN, "std": STD}, r"float images take grey_level, low, high, not mean, std"),
        ({"dtype": torch.float16}, r"float images take grey_level, low, high, not dtype"),
        ({"clean": True}, r"clean=True is for uint8 images"),
        ({"images": BYTES}, r"uint8 images take mean and std, not grey_level, low, high"),
        ({"images": BYTES, **NO_UNITS, "mean": MEAN}, r"mean and std: expected both or neither"),
        ({"images": BYTES, **NO_UNITS, "mean": MEAN, "std": (1, 0, 1)}, r"std: expected numbers > 0"),
        (
            {"images": BYTES, **NO_UNITS, "dtype": torch.float64},
            r"expected float32, float16 or bfloat16 as dtype, got torch\.float64",
        ),
        ({"backend": "gpu"}, r"backend must be one of 'auto', 'triton', 'reference', got 'gpu'"),
    ],
)
def test_bad_input(change, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        apply_delta(**_input(**change))
