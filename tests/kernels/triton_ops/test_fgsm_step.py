"""The kernel of the packed gradient step against the reference: equal bits, whatever the view, dtype or layout.

Both sum in float32 in one order and step in whole levels, so nothing is approximate.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ikd_fast.kernels import CellMap, DeltaCodes, fgsm_step_packed
from ikd_fast.kernels.triton_ops.launch import trace
from tests.kernels.cell_maps import Axis, all_maps, cell_map

pytestmark = pytest.mark.usefixtures("poison")

FRAME = (13, 21)


def records(codes: DeltaCodes, maps: list[CellMap], device) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [
        codes.pack(torch.randint(codes.levels, (3, *m.cells), dtype=torch.uint8, generator=g)).to(device)
        for m in maps
    ]


def gradients(n: int, device, dtype=torch.float32, layout: str = "contiguous", frame=FRAME) -> Tensor:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(n, 3, *frame, generator=g)
    x = torch.where(torch.rand(x.shape, generator=g) < 0.2, 0.0, x).to(dtype).to(device)
    if layout == "strided":
        return torch.stack([x, -x], -1)[..., 0]
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def assert_equal(
    gradient: Tensor, packed: list[Tensor], maps: list[CellMap], codes: DeltaCodes, step: Tensor
) -> None:
    kernel, reference = (
        fgsm_step_packed(gradient, packed, maps, codes, step, backend=b) for b in ("triton", "reference")
    )
    assert len(kernel) == len(reference) == len(maps)
    for a, b in zip(kernel, reference, strict=True):
        assert a.dtype == torch.uint8
        assert torch.equal(a, b)


def steps(n: int, step: float, device) -> Tensor:
    out = torch.full((n,), step)
    out[1::3] *= -1
    return out.to(device)


@pytest.mark.parametrize(
    ("bits", "step", "dtype"),
    [(2, 8.0, torch.float32), (4, 2.0, torch.bfloat16), (4, 3.1, torch.float32), (8, 2.6, torch.float16)],
    ids=str,
)
def test_every_view(device, bits, step, dtype) -> None:
    maps, codes = all_maps(), DeltaCodes.of(8, step, bits)
    packed, gradient = records(codes, maps, device), gradients(len(maps), device, dtype)
    assert_equal(gradient, packed, maps, codes, steps(len(maps), step, device))


@pytest.mark.parametrize("layout", ["channels_last", "strided"])
def test_layouts(device, layout) -> None:
    maps, codes = all_maps()[4:11:2], DeltaCodes.of(8, 2)
    packed, gradient = records(codes, maps, device), gradients(len(maps), device, layout=layout)
    assert_equal(gradient, packed, maps, codes, steps(len(maps), 2.0, device))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_of_whole_16_bytes_and_several_tiles(device, bits) -> None:
    frame, codes = (33, 48 * 8 // bits), DeltaCodes.of(8, 8, bits)
    cells = 48 * 8 // bits  # three times 16 bytes
    views = [
        cell_map((Axis(33, 33), Axis(cells, cells)), frame),
        cell_map((Axis(36, 31, offset=-4), Axis(cells, cells - 9, scale=-1, offset=cells - 5)), frame),
    ]
    gradient = gradients(2, device, frame=frame)
    for maps in (views, [views[1], cell_map((Axis(3, 3), Axis(cells + 3, cells, offset=-2)), frame)]):
        assert_equal(gradient, records(codes, maps, device), maps, codes, steps(2, 8.0, device))


def test_sums_are_taken_in_order(device) -> None:
    view, codes = cell_map((Axis(2, 2, 2), Axis(6, 6, 2)), (2, 6)), DeltaCodes.of(8, 2)
    packed = [codes.pack(torch.full((1, 1, 3), 4, dtype=torch.uint8)).to(device)]
    big = 2.0**25
    blocks = [[[big, 1.0], [-big, 0.0]], [[big, -big], [1.0, 0.0]], [[1.0, big], [0.0, -big]]]
    gradient = torch.cat([torch.tensor(b) for b in blocks], 1)[None, None].to(device)
    (new,) = fgsm_step_packed(
        gradient, packed, [view], codes, torch.tensor([2.0], device=device), backend="triton"
    )
    assert codes.decode(codes.unpack(new, (1, 1, 3))).flatten().tolist() == [0, 2, 0]


def test_a_step_of_zero_changes_no_bit(device) -> None:
    maps, codes = all_maps()[:5], DeltaCodes.of(8, 2)
    g = torch.Generator().manual_seed(0)
    packed = records(codes, maps, device)
    for i in (0, 1, 3):  # bytes that packing never makes
        packed[i] = torch.randint(256, packed[i].shape, generator=g).to(torch.uint8).to(device)
    gradient = gradients(len(maps), device)
    gradient[0], gradient[1] = float("nan"), float("inf")
    step = torch.zeros(len(maps), device=device)
    new = fgsm_step_packed(gradient, packed, maps, codes, step, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(new, packed, strict=True))
    step[2], step[4] = 2.0, -2.0
    assert_equal(gradient, packed, maps, codes, step)


def test_a_gradient_that_is_not_finite(device) -> None:
    """NaN has no sign; infinities have."""
    view, codes = cell_map((Axis(1, 1), Axis(4, 4)), (1, 4)), DeltaCodes.of(8, 2)
    packed = [codes.pack(torch.full((1, 1, 4), 4, dtype=torch.uint8)).to(device)]
    gradient = torch.tensor([[[[float("nan"), float("inf"), -float("inf"), 1e-30]]]], device=device)
    step = torch.tensor([2.0], device=device)
    assert_equal(gradient, packed, [view], codes, step)
    (new,) = fgsm_step_packed(gradient, packed, [view], codes, step, backend="triton")
    assert codes.decode(codes.unpack(new, (1, 1, 4))).flatten().tolist() == [0, 2, -2, 2]


@pytest.mark.parametrize("step", [1.0, 2.9, 3.0, -1.0, -3.0, 0.99, 1e30, -1e30, float("inf"), float("nan")])
def test_steps_in_whole_levels_are_the_references(device, step) -> None:
    view, codes = cell_map((Axis(1, 1), Axis(5, 5)), (1, 5)), DeltaCodes(4, 9, 2.0)
    packed = [codes.pack(torch.tensor([[[0, 2, 4, 6, 8]]] * 3, dtype=torch.uint8)).to(device)]
    gradient = torch.ones(1, 3, 1, 5, device=device)
    assert_equal(gradient, packed, [view], codes, torch.tensor([step], device=device))


def test_one_launch_whatever_the_batch(device) -> None:
    codes = DeltaCodes.of(8, 2)
    for count in (1, 3):
        maps = all_maps()[:count]
        packed, gradient = records(codes, maps, device), gradients(count, device)
        with trace() as record:
            out = fgsm_step_packed(gradient, packed, maps, codes, steps(count, 2.0, device), backend="triton")
        assert record.names == ["fgsm_step_forward"]
        tables = count * 16 * 8 + sum(4 * 2 * sum(m.cells) for m in maps)
        assert record.bytes == sum(x.numel() for x in out) + tables


def test_repeats_are_equal_and_rows_do_not_depend_on_the_batch(device) -> None:
    maps, codes = all_maps()[3:8], DeltaCodes.of(8, 2)
    packed, gradient = records(codes, maps, device), gradients(len(maps), device)
    step = steps(len(maps), 2.0, device)
    first, again = (fgsm_step_packed(gradient, packed, maps, codes, step, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for i in (1, 4):
        (alone,) = fgsm_step_packed(
            gradient[i : i + 1], packed[i : i + 1], maps[i : i + 1], codes, step[i : i + 1], backend="triton"
        )
        assert torch.equal(alone, first[i])


def test_errors_come_before_a_launch(device) -> None:
    maps, codes = all_maps()[:1], DeltaCodes.of(8, 2)
    packed, gradient = records(codes, maps, device), gradients(1, device)
    with trace() as record:
        with pytest.raises(ValueError, match=r"step: expected float32 \[1\]"):
            fgsm_step_packed(gradient, packed, maps, codes, torch.ones(2), backend="triton")
        with pytest.raises(TypeError, match=r"for backend='triton', got torch\.float64"):
            fgsm_step_packed(gradient.double(), packed, maps, codes, steps(1, 2.0, device), backend="triton")
    assert record.launches == []
    assert record.bytes == 0
