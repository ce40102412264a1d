"""Packed perturbations: levels, bytes by hand, keyed starts, maps that are refused."""

from __future__ import annotations

import pytest
import torch

from ikd_fast.kernels import CellMap, DeltaCodes, Stream, draw
from tests.kernels.cell_maps import Axis, cell_map


@pytest.mark.parametrize(
    ("eps", "step", "bits", "levels", "spacing"),
    [
        (8, 2, 4, 9, 2),
        (8, 2, 8, 9, 2),
        (7, 1, 4, 15, 1),
        (8, 1, 4, 15, 8 / 7),  # 17 levels do not fit
        (8, 3, 4, 15, 8 / 7),
        (8, 10, 4, 15, 8 / 7),
        (8, 10, 8, 255, 8 / 127),
        (8, 8, 2, 3, 8),
        (8, 4, 2, 3, 8),
        (0.3, 0.1, 4, 7, 0.1),  # 0.3 / 0.1 is 2.9999999999999996
        (0, 0, 4, 1, 1),
    ],
)
def test_levels(eps, step, bits, levels, spacing) -> None:
    codes = DeltaCodes.of(eps, step, bits)
    assert (codes.bits, codes.levels) == (bits, levels)
    assert codes.spacing == pytest.approx(spacing, rel=1e-12)
    assert codes.limit == pytest.approx(eps, rel=1e-12)


def test_values_are_symmetric_and_reach_the_limit() -> None:
    codes = DeltaCodes.of(8, 2)
    values = codes.decode(torch.arange(9, dtype=torch.uint8))
    assert values.dtype == torch.float32
    assert values.tolist() == [-8, -6, -4, -2, 0, 2, 4, 6, 8]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_encoding_takes_the_nearest_level(bits) -> None:
    codes = DeltaCodes.of(8, 5, bits)
    grey = torch.linspace(-12, 12, 997)
    got = codes.encode(grey)
    assert got.dtype == torch.uint8
    assert int(got.max()) == codes.levels - 1
    values = codes.decode(torch.arange(codes.levels, dtype=torch.uint8)).double()
    distances = (grey.double()[:, None] - values).abs()
    # A float32 quotient may take the other of two levels that are equally far.
    assert (distances.gather(1, got.long()[:, None])[:, 0] <= distances.min(1).values + 1e-5).all()
    assert torch.equal(codes.encode(codes.decode(got)), got)


@pytest.mark.parametrize(
    ("bits", "bytes_"),
    [
        (2, [[0b00_10_01_10, 0b01], [0b10_10_00_01, 0b10]]),
        (4, [[0x12, 0x02, 0x01], [0x01, 0x22, 0x02]]),
        (8, [[2, 1, 2, 0, 1], [1, 0, 2, 2, 2]]),
    ],
)
def test_bytes_of_a_record(bits, bytes_) -> None:
    """Low bits first, every row begins a byte, what is left of its last byte is 0."""
    rows = torch.tensor([[[2, 1, 2, 0, 1], [1, 0, 2, 2, 2]]], dtype=torch.uint8)
    codes = DeltaCodes(bits, 3, 8.0)
    record = codes.pack(rows)
    assert record.tolist() == [b for row in bytes_ for b in row]
    assert record.numel() == codes.nbytes(1, 2, 5) == 2 * codes.pitch(5)
    assert torch.equal(codes.unpack(record, (1, 2, 5)), rows)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 1), (2, 3, 8), (4, 2, 9)])
def test_packing_is_undone(bits, shape) -> None:
    codes = DeltaCodes(bits, 2**bits - 1, 1.0)
    rows = torch.randint(codes.levels, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    record = codes.pack(rows)
    assert record.shape == (codes.nbytes(*shape),)
    assert torch.equal(codes.unpack(record, shape), rows)
    turned = rows.transpose(1, 2)
    assert torch.equal(codes.unpack(codes.pack(turned), turned.shape), turned)


def test_start_is_the_keyed_uniform_of_its_cells() -> None:
    codes, key = DeltaCodes.of(8, 2), dict(seed=2**63 + 5, id=2**64 - 3, epoch=7)
    channels, height, width = 3, 4, 6
    got = codes.decode(codes.unpack(codes.start((channels, height, width), **key), (channels, height, width)))
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                index = (c * height + y) * 8 + x
                u = draw(key["seed"], key["id"], key["epoch"], Stream.START, index // 4)[index % 4]
                # No value is closer than 1e-3 to the middle of two levels, where float32 might decide otherwise.
                assert abs((u * 16 - 8) % 2 - 1) > 1e-3
                assert got[c, y, x] == 2 * round((u * 16 - 8) / 2)


def test_start_fills_the_ball_and_differs_by_key() -> None:
    codes, shape = DeltaCodes.of(8, 2), (3, 60, 50)
    record = codes.start(shape, seed=0, id=1, epoch=0)
    share = codes.unpack(record, shape).flatten().bincount(minlength=16).double() / 9000
    expected = torch.tensor([1 / 16] + [1 / 8] * 7 + [1 / 16] + [0.0] * 7).double()
    # Four standard errors of a share of 1/8 in 9000 draws.
    assert (share - expected).abs().max() < 4 * (1 / 8 * 7 / 8 / 9000) ** 0.5
    for key in (dict(seed=1, id=1, epoch=0), dict(seed=0, id=2, epoch=0), dict(seed=0, id=1, epoch=1)):
        assert not torch.equal(codes.start(shape, **key), record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, r"bits must be one of \[2, 4, 8\], got 3"),
        ({"levels": 8}, r"levels must be an odd integer in 1\.\.15 at 4 bits, got 8"),
        ({"levels": 17}, r"levels must be an odd integer in 1\.\.15 at 4 bits, got 17"),
        ({"spacing": 0.0}, r"spacing must be a finite number of grey levels > 0, got 0\.0"),
        ({"spacing": float("nan")}, r"spacing must be .*got nan"),
    ],
)
def test_bad_levels(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        DeltaCodes(**{"bits": 4, "levels": 9, "spacing": 2.0, **change})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((8, 2, 5), r"bits must be one of \[2, 4, 8\], got 5"),
        ((-1, 2, 4), r"eps must be a finite number of grey levels >= 0, got -1"),
        ((8, float("inf"), 4), r"step must be a finite number of grey levels >= 0, got inf"),
        (
            (8, 0.5, 4),
            r"step=0\.5 is below half of the 1\.14286 grey levels .*eps=8, bits=4.*write step=0\.571429 or more, or bits=8",
        ),
        ((8, 2, 2), r"step=2 is below half of the 8 grey levels .*write step=4 or more, or bits=4"),
        ((8, 0, 8), r"step=0 is below half of .*write step=0\.031497 or more$"),
    ],
)
def test_bad_attack_settings(args, message) -> None:
    with pytest.raises(ValueError, match=message):
        DeltaCodes.of(*args)


def test_the_step_that_is_named_is_accepted() -> None:
    assert DeltaCodes.of(8, 0.571429, 4).levels == 15
    assert DeltaCodes.of(8, 0.5, 8).levels == 33
    assert DeltaCodes.of(8, 0.031497, 8).levels == 255


def test_bad_records_and_codes() -> None:
    codes = DeltaCodes.of(8, 2)
    with pytest.raises(ValueError, match=r"codes must be uint8 \[C, H, W\], got torch\.int64 \[1, 2, 2\]"):
        codes.pack(torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"record: expected contiguous uint8 \[12\] for 1x4x5 cells of 4 bits, got .*\[11\]"
    ):
        codes.unpack(torch.zeros(11, dtype=torch.uint8), (1, 4, 5))
    with pytest.raises(ValueError, match=r"record: .*got torch\.uint8 \[12\] with strides"):
        codes.unpack(torch.zeros(24, dtype=torch.uint8)[::2], (1, 4, 5))


def test_maps() -> None:
    view = cell_map((Axis(4, 4), Axis(6, 5, 2, offset=-1)), (5, 6))
    assert view.frame == (5, 6)
    assert view.cells == (4, 3)
    assert view.x_cell.tolist() == [0, 1, 1, 2, 2, -1]
    assert view.x_span.tolist() == [[0, 1], [1, 3], [3, 5]]
    assert view.y_cell.tolist() == [0, 1, 2, 3, -1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cells": (0, 3)}, r"cells must be \(Hc, Wc\), both >= 1, got \(0, 3\)"),
        ({"x_cell": torch.zeros(5)}, r"x_cell: expected int32 \[n\] on the CPU, got torch\.float32 \[5\]"),
        ({"y_cell": torch.zeros(0, dtype=torch.int32)}, r"y_cell: expected int32 \[n\] .*\[0\]"),
        (
            {"x_span": torch.zeros(2, 2, dtype=torch.int32)},
            r"x_span: expected int32 \[3, 2\] on the CPU, got torch\.int32 \[2, 2\]",
        ),
        (
            {"y_cell": torch.tensor([0, 4], dtype=torch.int32)},
            r"y_cell: expected cells in -1\.\.3, got 0\.\.4",
        ),
        (
            {"x_cell": torch.tensor([0, -2], dtype=torch.int32)},
            r"x_cell: expected cells in -1\.\.2, got -2\.\.0",
        ),
        (
            {"x_span": torch.tensor([[0, 1], [1, 7], [0, 0]], dtype=torch.int32)},
            r"x_span: expected 0 <= start <= stop <= 6 in every row, got 0\.\.7",
        ),
        (
            {"x_span": torch.tensor([[0, 1], [3, 2], [0, 0]], dtype=torch.int32)},
            r"x_span: expected 0 <= start <= stop .*start > stop",
        ),
    ],
)
def test_bad_maps(change, message) -> None:
    view = cell_map((Axis(4, 4), Axis(6, 5, 2, offset=-1)), (5, 6))
    fields = {k: getattr(view, k) for k in ("cells", "x_cell", "y_cell", "x_span", "y_span")}
    with pytest.raises(ValueError, match=message):
        CellMap(**{**fields, **change})
