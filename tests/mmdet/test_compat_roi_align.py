"""RoIAlign through mmcv.ops: against scipy's interpolation, finite differences and compiled mmcv."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor

import ikd_fast.mmdet  # noqa: F401  activates compat before mmcv.ops is imported
from ikd_fast.mmdet.compat import roi_align as operator
from tests.mmdet.operator_truth import plain_extension, recording_torchvision, serve
from tests.tolerances import assert_near, gradcheck

WAYS = [(mode, ratio, aligned) for mode in ("avg", "max") for ratio in (0, 2) for aligned in (True, False)]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, plain_extension(monkeypatch))


def sample(dtype: torch.dtype = torch.float64, count: int = 12, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Two maps of 11 x 17 at a quarter of the image's size, and rois across their borders."""
    generator = torch.Generator().manual_seed(3)
    maps = torch.randn(2, channels, 11, 17, generator=generator, dtype=torch.float64)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([68.0, 44.0]) - 8
    size = torch.rand(count, 2, generator=generator).square() * torch.tensor([90.0, 60.0])
    size[0] = 0.0  # empty
    corner[1] = torch.tensor([200.0, 10.0])  # off the map
    image = torch.randint(0, 2, (count, 1), generator=generator)
    return maps.to(dtype), torch.cat([image, corner, corner + size], 1).to(dtype)


def by_loops(maps: Tensor, rois: Tensor, bins: tuple[int, int], scale: float, ratio: int, mode: str, aligned: bool) -> Tensor:  # fmt: skip
    """Section 3 of Mask R-CNN, a sample at a time in float64, interpolated by scipy."""
    height, width = maps.shape[2:]
    out = np.zeros((len(rois), maps.size(1), *bins))
    for r, (image, *corners) in enumerate(rois.double().tolist()):
        x1, y1, x2, y2 = (v * scale - (0.5 if aligned else 0.0) for v in corners)
        roi_h, roi_w = (y2 - y1, x2 - x1) if aligned else (max(y2 - y1, 1.0), max(x2 - x1, 1.0))
        bin_h, bin_w = roi_h / bins[0], roi_w / bins[1]
        grid_h, grid_w = (ratio, ratio) if ratio else (int(np.ceil(bin_h)), int(np.ceil(bin_w)))
        for c in range(maps.size(1)):
            plane = maps[int(image), c].double().numpy()
            for i, j in np.ndindex(*bins):
                values = []
                for k, m in np.ndindex(grid_h, grid_w):
                    y, x = (
                        y1 + (i + (k + 0.5) / grid_h) * bin_h,
                        x1 + (j + (m + 0.5) / grid_w) * bin_w,
                    )
                    known = -1 <= y <= height and -1 <= x <= width
                    values.append(
                        map_coordinates(plane, [[y], [x]], order=1, mode="nearest")[0] if known else 0.0
                    )
                if mode == "avg":
                    out[r, c, i, j] = np.mean(values) if values else 0.0
                else:
                    out[r, c, i, j] = max(values, default=operator.EMPTY_MAXIMUM)
    return torch.from_numpy(out)


@pytest.mark.parametrize(("mode", "ratio", "aligned"), WAYS)
def test_equals_the_definition(mode: str, ratio: int, aligned: bool) -> None:
    from mmcv.ops import RoIAlign

    maps, rois = sample(channels=2)
    expected = by_loops(maps, rois, (3, 2), 0.25, ratio, mode, aligned)
    pool = RoIAlign((3, 2), 0.25, ratio, mode, aligned)
    # A few float64 roundings of coordinates up to 20 and of values up to 3.
    torch.testing.assert_close(pool(maps, rois), expected, rtol=0, atol=1e-13)
    # In float32 a coordinate of 17 is off by 1e-6, a value by that times the step between neighbours (up to 6).
    torch.testing.assert_close(pool(maps.float(), rois.float()), expected.float(), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize(("mode", "ratio", "aligned"), WAYS)
def test_gradient(mode: str, ratio: int, aligned: bool) -> None:
    from mmcv.ops import roi_align

    maps, rois = sample(count=4, channels=1)
    gradcheck(
        lambda x: roi_align(x, rois, (2, 3), 0.25, ratio, mode, aligned), maps[:, :, :5, :7].requires_grad_()
    )


def test_by_hand() -> None:
    from mmcv.ops import roi_align

    ramp = torch.arange(4.0).view(1, 1, 1, 4) + 10 * torch.arange(4.0).view(1, 1, 4, 1)
    # The whole map, aligned: bins of 2 x 2 pixels, samples at the pixel centres: plain means.
    whole = roi_align(ramp, torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]]), 2, 1.0, 0, "avg", True)
    assert whole.flatten().tolist() == [5.5, 7.5, 25.5, 27.5]
    # Equal values: the first sample counts, and its gradient goes to the pixels around it.
    flat = torch.ones(1, 1, 2, 2, requires_grad=True)
    pooled = roi_align(flat, torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]]), 1, 1.0, 0, "max", True)
    (grad,) = torch.autograd.grad(pooled.sum(), flat)
    assert grad.flatten().tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_empty_negative_and_no_rois(mode: str) -> None:
    from mmcv.ops import roi_align

    maps = torch.rand(1, 2, 4, 4, requires_grad=True)
    rois = torch.tensor([[0.0, 3.0, 3.0, 3.0, 3.0], [0.0, 9.0, 9.0, 5.0, 5.0]])
    pooled = roi_align(maps, rois, 2, 0.5, 0, mode, True)
    assert torch.equal(pooled, torch.full((2, 2, 2, 2), 0.0 if mode == "avg" else operator.EMPTY_MAXIMUM))
    (grad,) = torch.autograd.grad(pooled.sum(), maps)
    assert torch.equal(grad, torch.zeros_like(maps))
    none = roi_align(maps, rois[:0], 2, 0.5, 0, mode, True)
    assert none.shape == (0, 2, 2, 2)
    (grad,) = torch.autograd.grad(none.sum(), maps)
    assert torch.equal(grad, torch.zeros_like(maps))


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_bounded_memory_changes_nothing(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmcv.ops import roi_align

    maps, rois = sample(torch.float32, count=20)

    def both() -> tuple[Tensor, Tensor]:
        x = maps.clone().requires_grad_()
        pooled = roi_align(x, rois, 2, 0.25, 0, mode, True)
        (grad,) = torch.autograd.grad((pooled * torch.arange(pooled.numel()).view_as(pooled)).sum(), x)
        return pooled.detach(), grad

    at_once = both()
    sizes: list[int] = []
    corners = operator._corners

    def counted(y: Tensor, *args: object) -> tuple[Tensor, Tensor]:
        sizes.append(len(y))
        return corners(y, *args)

    monkeypatch.setattr(operator, "_corners", counted)
    monkeypatch.setattr(operator, "SAMPLES", 300)
    in_parts = both()
    assert len(sizes) >= 4
    assert max(sizes) <= 300
    assert torch.equal(in_parts[0], at_once[0])
    assert_near(in_parts[1], at_once[1], 1e-6)  # sums of the same terms in another order


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_half_types_are_computed_in_float32(dtype: torch.dtype, mode: str) -> None:
    from mmcv.ops import roi_align

    maps, rois = sample(dtype)
    pooled = roi_align(maps, rois, 2, 0.25, 2, mode, True)
    assert pooled.dtype == dtype
    assert torch.equal(pooled, roi_align(maps.float(), rois.float(), 2, 0.25, 2, mode, True).to(dtype))
    grads = []
    for x in (maps.clone(), maps.float()):
        x.requires_grad_()
        pooled = roi_align(x, rois.type_as(x), 2, 0.25, 2, "avg", True)
        grads.append(torch.autograd.grad(pooled, x, torch.ones_like(pooled))[0])
    assert torch.equal(grads[0], grads[1].to(dtype))


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_other_memory_formats(mode: str) -> None:
    from mmcv.ops import roi_align

    maps, rois = sample()
    found = []
    for x in (maps.clone(), maps.contiguous(memory_format=torch.channels_last)):
        pooled = roi_align(x.requires_grad_(), rois, 2, 0.25, 2, mode, True)
        found.append((pooled, *torch.autograd.grad(pooled.square().sum(), x)))
    assert_near(found[1][0], found[0][0], 1e-14)
    assert_near(found[1][1], found[0][1], 1e-14)


def test_autocast_of_the_caller_does_not_round() -> None:
    from mmcv.ops import roi_align

    maps, rois = sample(torch.float32)
    plain = roi_align(maps, rois, 2, 0.25, 0, "avg", True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(roi_align(maps, rois, 2, 0.25, 0, "avg", True), plain)


def test_wrong_input_is_named() -> None:
    from mmcv.ops import roi_align

    maps, rois = sample(torch.float32)
    rois[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"expects finite rois, got NaN .*lower the learning rate"):
        roi_align(maps, rois, 7, 0.25, 0, "avg", True)
    with pytest.raises(ValueError, match=r"expects images 0\.\.0 in rois\[:, 0\], got 0\.\.1"):
        roi_align(maps[:1], rois, 7, 0.25, 2, "avg", True)
    with pytest.raises(ValueError, match=r"rois \[R, 5\] .*, got \(12, 4\)"):
        operator.roi_align_forward(maps, rois[:, 1:], *[torch.empty(0)] * 3, 7, 7, 0.25, 0, 1, True)
    with pytest.raises(ValueError, match=r"pooled features \(12, 3, 7, 7\), got \(12, 3, 7, 6\)"):
        operator.roi_align_forward(maps, rois, *[torch.empty(12, 3, 7, 6)] * 3, 7, 7, 0.25, 0, 1, True)


@pytest.mark.parametrize(("mode", "ratio", "aligned"), WAYS)
def test_through_torchvision(mode: str, ratio: int, aligned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torchvision that is checked against the same definition on the way."""
    from ikd_fast.mmdet.compat import operators

    from mmcv.ops import roi_align

    maps, rois = sample(torch.float32)
    upstream = torch.randn(len(rois), 3, 3, 2, generator=torch.Generator().manual_seed(4))

    def both() -> tuple[Tensor, Tensor]:
        x = maps.clone().requires_grad_()
        pooled = roi_align(x, rois, (3, 2), 0.25, ratio, mode, aligned)
        return pooled.detach(), torch.autograd.grad(pooled, x, upstream)[0]

    plain = both()
    ops = recording_torchvision()
    monkeypatch.setattr(operators, "find_torchvision", lambda: (ops, None))
    extension, providers = operators.build_extension()
    assert providers["roi_align_forward"] == providers["roi_align_backward"] == "torchvision"
    serve(monkeypatch, extension)
    served = both()
    assert [name for name, _ in ops.calls] == ["roi_align"] * (2 if mode == "avg" else 0)
    for (_, arguments), same in zip(ops.calls, (torch.equal, lambda a, b: not a.any()), strict=False):
        assert same(arguments.pop("input"), maps)
        assert torch.equal(arguments.pop("boxes"), rois)
        assert arguments == {
            "output_size": (3, 2), "spatial_scale": 0.25, "sampling_ratio": ratio, "aligned": aligned,
        }  # fmt: skip
    # grid_sample's coordinates take a detour through -1..1: 1e-6 of a pixel.
    assert_near(served[0], plain[0], 1e-5)
    assert_near(served[1], plain[1], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("mode", "ratio", "aligned"), WAYS)
def test_equals_compiled_mmcv(mode, ratio, aligned, dtype, monkeypatch, compiled_operators) -> None:
    from mmcv.ops import roi_align

    generator = torch.Generator().manual_seed(5)
    maps = torch.randn(2, 5, 50, 84, generator=generator, dtype=dtype)
    corner = torch.rand(100, 2, generator=generator) * torch.tensor([320.0, 190.0]) - 6
    size = torch.rand(100, 2, generator=generator).square() * torch.tensor([250.0, 160.0])
    size[:5] = 0.0
    image = torch.randint(0, 2, (100, 1), generator=generator)
    rois = torch.cat([image, corner, corner + size], 1).to(dtype)
    upstream = torch.randn(100, 5, 7, 7, generator=generator, dtype=dtype)

    def both() -> tuple[Tensor, Tensor]:
        x = maps.clone().requires_grad_()
        pooled = roi_align(x, rois, 7, 0.25, ratio, mode, aligned)
        return pooled.detach(), torch.autograd.grad(pooled, x, upstream)[0]

    ours = both()
    serve(monkeypatch, compiled_operators)
    compiled = both()
    for mine, theirs in zip(ours, compiled, strict=True):
        real = theirs.abs() < 1000  # not the mark of an empty maximum, which would drown the rest
        assert torch.equal(mine[~real], theirs[~real])
        # Sums of up to some hundred float32 terms in another order.
        assert_near(mine[real], theirs[real], 2e-6 if dtype == torch.float32 else 1e-14)


def test_parts_cover_all_rois_and_hold_few_samples() -> None:
    chunks = list(operator._chunks(torch.full((2048,), 49 * 16)))
    assert len(chunks) == 2
    assert [c[0] for c in chunks[1:]] == [c[1] for c in chunks[:-1]]
    assert chunks[-1][1] == 2048
    assert sum(c[2] for c in chunks) == 2048 * 49 * 16
    assert max(c[2] for c in chunks) <= operator.SAMPLES
    huge = list(operator._chunks(torch.tensor([3, operator.SAMPLES + 1, 0, 2])))
    assert [c[:2] for c in huge] == [(0, 1), (1, 2), (2, 4)]
