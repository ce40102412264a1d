"""The packed gradient step against a loop over cells, whose sums are float32 in the documented order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import CellMap, DeltaCodes, fgsm_step_packed
from ikd_fast.kernels.ops import fgsm_step as op
from tests.kernels.cell_maps import VIEWS, Axis, all_maps, cell_map

FRAME = (13, 21)


def random_records(codes: DeltaCodes, maps: list[CellMap]) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [
        codes.pack(torch.randint(codes.levels, (3, *m.cells), dtype=torch.uint8, generator=g)) for m in maps
    ]


def gradients(n: int, dtype: torch.dtype) -> Tensor:
    """A fifth of the values is exactly 0."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(n, 3, *FRAME, generator=g)
    return torch.where(torch.rand(x.shape, generator=g) < 0.2, 0.0, x).to(dtype)


def expected(gradient: Tensor, record: Tensor, view: CellMap, codes: DeltaCodes, step: float) -> np.ndarray:
    """Codes of the nearest level to the clamped sum, in float64; no tie occurs at the steps of these tests."""
    before = codes.unpack(record, (3, *view.cells)).numpy().astype(int)
    levels = (np.arange(codes.levels) - codes.levels // 2) * codes.spacing
    pixels = gradient.double().numpy() if gradient.dtype == torch.float64 else gradient.float().numpy()
    after = before.copy()
    for c in range(3):
        for i, (y0, y1) in enumerate(view.y_span.tolist()):
            for j, (x0, x1) in enumerate(view.x_span.tolist()):
                total = pixels.dtype.type(0)
                for y in range(y0, y1):
                    for x in range(x0, x1):
                        total = total + pixels[c, y, x]
                if step and np.sign(total):
                    value = np.clip(
                        levels[before[c, i, j]] + step * np.sign(total), -codes.limit, codes.limit
                    )
                    after[c, i, j] = np.abs(levels - value).argmin()
    return after


@pytest.mark.parametrize(
    ("bits", "step"), [(4, 2.0), (4, -10.0), (8, 2.6), (2, 8.0), (4, 3.1)], ids=lambda v: str(v)
)
def test_every_view(bits, step) -> None:
    codes = DeltaCodes.of(8, abs(step), bits)
    maps = all_maps()
    records = random_records(codes, maps)
    steps = torch.full((len(maps),), step)
    steps[1::3] *= -1
    changed = 0.0
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        gradient = gradients(len(maps), dtype)
        got = fgsm_step_packed(gradient, records, maps, codes, steps)
        for n, (record, new, view) in enumerate(zip(records, got, maps, strict=True)):
            assert new.dtype == torch.uint8
            assert new.shape == record.shape
            after = codes.unpack(new, (3, *view.cells)).numpy()
            np.testing.assert_array_equal(after, expected(gradient[n], record, view, codes, float(steps[n])))
            changed += float((new != record).double().mean())
    assert changed > len(maps)  # of four times as many


def test_sums_are_float32_rows_outside() -> None:
    """The order decides whether a large term swallows a small one."""
    view, codes = cell_map((Axis(2, 2, 2), Axis(8, 8, 2)), (2, 8)), DeltaCodes.of(8, 2)
    record = codes.pack(torch.full((1, 1, 4), 4, dtype=torch.uint8))
    big = 2.0**25
    blocks = [
        ([[big, 1.0], [-big, 0.0]], 0.0),
        ([[big, -big], [1.0, 0.0]], 2.0),
        ([[1.0, big], [0.0, -big]], 0.0),
        ([[0.5, -1.0], [0.25, 0.125]], -2.0),
    ]
    gradient = torch.cat([torch.tensor(b) for b, _ in blocks], 1)[None, None]
    for dtype, wanted in ((torch.float32, [v for _, v in blocks]), (torch.float64, [2.0, 2.0, 2.0, -2.0])):
        (new,) = fgsm_step_packed(gradient.to(dtype), [record], [view], codes, torch.tensor([2.0]))
        assert codes.decode(codes.unpack(new, (1, 1, 4))).flatten().tolist() == wanted


def test_cells_that_no_pixel_reads_step_on_their_own_column() -> None:
    """At half scale two cells share a pixel: spans overlap."""
    view, codes = cell_map((Axis(1, 1), Axis(6, 3, scale=0.5)), (1, 3)), DeltaCodes.of(8, 2)
    assert view.x_span.tolist() == [[0, 1], [0, 1], [1, 2], [1, 2], [2, 3], [2, 3]]
    record = codes.pack(torch.full((1, 1, 6), 4, dtype=torch.uint8))
    (new,) = fgsm_step_packed(
        torch.tensor([[[[1.0, -1.0, 0.0]]]]), [record], [view], codes, torch.tensor([2.0])
    )
    assert codes.decode(codes.unpack(new, (1, 1, 6))).flatten().tolist() == [2, 2, -2, -2, 0, 0]


def test_a_step_of_zero_changes_no_bit() -> None:
    """Neither what the gradient holds nor codes and spare bits that packing never writes."""
    maps, codes = all_maps(), DeltaCodes.of(8, 2)
    records = [torch.randint(256, r.shape).to(torch.uint8) for r in random_records(codes, maps)]
    gradient = gradients(len(maps), torch.float32)
    gradient[0] = float("nan")
    gradient[1] = float("inf")
    steps = torch.zeros(len(maps))
    steps[2] = 2.0
    new = fgsm_step_packed(gradient, records, maps, codes, steps)
    assert [torch.equal(a, b) for a, b in zip(new, records, strict=True)] == [
        i != 2 for i in range(len(maps))
    ]
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(new, records, strict=True))


def test_a_zero_gradient_and_cells_out_of_view_keep_their_codes() -> None:
    codes = DeltaCodes.of(8, 2)
    maps = [cell_map(VIEWS["identity"]), cell_map(VIEWS["nothing in view"]), cell_map(VIEWS["cropped"])]
    records = random_records(codes, maps)
    gradient = torch.ones(3, 3, *FRAME)
    gradient[0] = 0.0
    new = fgsm_step_packed(gradient, records, maps, codes, torch.full((3,), 2.0))
    assert torch.equal(new[0], records[0])
    assert torch.equal(new[1], records[1])
    before, after = (codes.unpack(r[2], (3, *maps[2].cells)) for r in (records, new))
    assert torch.equal(after[:, 7:18, 13:33], (before[:, 7:18, 13:33] + 2 - 1).clamp(max=8))
    after[:, 7:18, 13:33] = before[:, 7:18, 13:33]
    assert torch.equal(after, before)


@pytest.mark.parametrize(
    ("step", "levels"),
    [(1.0, 1), (2.9, 1), (3.0, 2), (-1.0, -1), (-3.0, -2), (0.99, 0), (1e30, 4), (-1e30, -4)],
)
def test_steps_are_whole_levels_and_halves_go_up(step, levels) -> None:
    view, codes = cell_map((Axis(1, 1), Axis(1, 1)), (1, 1)), DeltaCodes(4, 9, 2.0)
    record = codes.pack(torch.full((1, 1, 1), 4, dtype=torch.uint8))
    (new,) = fgsm_step_packed(torch.ones(1, 1, 1, 1), [record], [view], codes, torch.tensor([step]))
    assert int(new) - 4 == levels


def test_five_steps_reach_the_limit_and_stay() -> None:
    view, codes = cell_map(VIEWS["mirrored"]), DeltaCodes.of(8, 2)
    record = codes.pack(torch.full((3, *view.cells), 4, dtype=torch.uint8))
    gradient = torch.randn(1, 3, *FRAME, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        (record,) = fgsm_step_packed(gradient, [record], [view], codes, torch.tensor([2.0]))
    values = codes.decode(codes.unpack(record, (3, *view.cells)))
    assert torch.equal(values[..., :19], 8 * gradient[0, ..., :19].flip(-1).sign())
    assert view.cells == (13, 19)


def test_any_strides_and_rows_do_not_depend_on_the_batch() -> None:
    maps, codes = all_maps(), DeltaCodes.of(8, 2)
    records, gradient = random_records(codes, maps), gradients(len(maps), torch.float32)
    before, steps = gradient.clone(), torch.full((len(maps),), 2.0)
    want = fgsm_step_packed(gradient, records, maps, codes, steps)
    last = fgsm_step_packed(
        gradient.contiguous(memory_format=torch.channels_last), records, maps, codes, steps
    )
    wide = torch.stack([gradient, -gradient], -1)[..., 0]
    strided = fgsm_step_packed(wide, records, maps, codes, steps)
    for n, view in enumerate(maps):
        alone = fgsm_step_packed(gradient[n : n + 1], records[n : n + 1], [view], codes, steps[:1])
        assert torch.equal(want[n], last[n])
        assert torch.equal(want[n], strided[n])
        assert torch.equal(want[n], alone[0])
    assert torch.equal(gradient, before)
    assert fgsm_step_packed(gradient[:0], [], [], codes, steps[:0]) == []


def test_opcheck() -> None:
    maps, codes = all_maps()[:4], DeltaCodes.of(8, 2)
    tables = [n for m in maps for n in m.cells], [m.x_span for m in maps], [m.y_span for m in maps]
    args = (gradients(4, torch.bfloat16), random_records(codes, maps), *tables)
    torch.library.opcheck(
        op._op, (*args, codes.bits, codes.levels, codes.spacing, torch.full((4,), 2.0), "auto")
    )


def test_compiled_equals_eager() -> None:
    maps, codes = all_maps()[:3], DeltaCodes.of(8, 2)
    args = gradients(3, torch.float32), random_records(codes, maps), torch.full((3,), 2.0)

    def function(gradient, records, step):
        return [r ^ 1 for r in fgsm_step_packed(gradient * 2, records, maps, codes, step)]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*args), function(*args), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient": torch.zeros(3, 4, 6)}, r"gradient: expected \[N, C, H, W\], got \[3, 4, 6\]"),
        (
            {"gradient": torch.zeros(1, 3, 4, 6, dtype=torch.uint8)},
            r"gradient: expected float16, .*got torch\.uint8",
        ),
        ({"gradient": torch.zeros(1, 3, 5, 6)}, r"maps\[0\]: expected a map onto the frame \(5, 6\)"),
        (
            {"records": []},
            r"fgsm_step_packed: expected a record and a map for each of 1 images, got 0 records and 1 maps",
        ),
        (
            {"records": [torch.zeros(37, dtype=torch.uint8)]},
            r"records\[0\]: expected contiguous uint8 \[36\]",
        ),
        ({"step": 2.0}, r"step: expected float32 \[1\], .*got 2\.0"),
        ({"step": torch.ones(2)}, r"step: expected float32 \[1\], .*got torch\.float32 \[2\]"),
        ({"step": torch.ones(1).double()}, r"step: expected float32 \[1\], .*got torch\.float64 \[1\]"),
        (
            {"step": torch.ones(1, device="meta")},
            r"step: expected cpu as the gradient, got meta; write step\.to\(gradient\.device\)",
        ),
        ({"backend": "gpu"}, r"backend must be one of 'auto', 'triton', 'reference', got 'gpu'"),
    ],
)
def test_bad_input(change, message) -> None:
    codes = DeltaCodes.of(8, 2)
    args = {
        "gradient": torch.zeros(1, 3, 4, 6),
        "records": [torch.zeros(36, dtype=torch.uint8)],
        "maps": [cell_map((Axis(4, 4), Axis(5, 5)), (4, 6))],
        "codes": codes,
        "step": torch.ones(1),
    }
    with pytest.raises((ValueError, TypeError), match=message):
        fgsm_step_packed(**{**args, **change})
