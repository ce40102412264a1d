"""nms against a float64 loop, against the compiled mmcv where there is one, and through mmcv.ops."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

import ikd_fast.mmdet  # noqa: F401  activates compat before mmcv.ops is imported
from ikd_fast.mmdet.compat.nms import BLOCK, nms
from tests.mmdet.operator_truth import plain_extension, serve


def brute_force(boxes: Tensor, scores: Tensor, threshold: Fraction | float, offset: int) -> list[int]:
    """Greedy NMS as an explicit loop in float64. The order of ties is that of torch's sort, as in mmcv."""
    b = boxes.double().numpy()
    order = scores.sort(0, descending=True).indices.tolist()
    kept: list[int] = []
    for j in order:
        for i in kept:
            w = max(0.0, min(b[i, 2], b[j, 2]) - max(b[i, 0], b[j, 0]) + offset)
            h = max(0.0, min(b[i, 3], b[j, 3]) - max(b[i, 1], b[j, 1]) + offset)
            area_i = (b[i, 2] - b[i, 0] + offset) * (b[i, 3] - b[i, 1] + offset)
            area_j = (b[j, 2] - b[j, 0] + offset) * (b[j, 3] - b[j, 1] + offset)
            union = area_i + area_j - w * h
            if union != 0 and w * h / union > float(threshold):
                break
        else:
            kept.append(j)
    return kept


def boxes_on_grid(
    n: int, generator: torch.Generator, *, step: int = 4, degenerate: bool = True
) -> tuple[Tensor, Tensor]:
    """Integer boxes (equal, touching, empty and inverted ones among them) with scores in eighths.

    Integer corners make every float32 intersection and union exact, and two different IoUs differ by far more than
    a rounding, so float32 and float64 must agree exactly.
    """
    corner = torch.randint(0, 24, (n, 2), generator=generator) * step
    low = -1 if degenerate else 1
    size = torch.randint(low, 8, (n, 2), generator=generator) * step
    scores = torch.randint(0, 9, (n,), generator=generator) / 8
    return torch.cat([corner, corner + size], dim=1).float(), scores


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.0, 0.3, Fraction(1, 3), 0.5, 0.6, 1.0])
def test_equals_the_float64_loop_on_ties_and_degenerate_boxes(threshold: float, offset: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for n in (1, 2, 7, 40, 90):
        for _ in range(6):
            boxes, scores = boxes_on_grid(n, generator)
            kept = nms(boxes, scores, iou_threshold=float(threshold), offset=offset)
            assert kept.tolist() == brute_force(boxes, scores, threshold, offset)


def test_more_boxes_than_one_block() -> None:
    # Crosses two block borders, so suppression by boxes of an earlier block is exercised.
    generator = torch.Generator().manual_seed(2)
    corner = torch.randint(0, 400, (2 * BLOCK + 100, 2), generator=generator)
    boxes = torch.cat(
        [corner, corner + torch.randint(8, 40, corner.shape, generator=generator)], dim=1
    ).float()
    scores = torch.rand(len(boxes), generator=generator)
    kept = nms(boxes, scores, iou_threshold=0.3, offset=0).tolist()
    assert kept == brute_force(boxes, scores, 0.3, 0)
    assert BLOCK < len(kept) < len(boxes)


def test_by_hand() -> None:
    boxes = torch.tensor(
        [
            [0.0, 0.0, 10.0, 10.0],
            [0.0, 0.0, 10.0, 5.0],  # IoU 50/100 with the first: equal to the threshold, stays
            [0.0, 0.0, 10.0, 6.0],  # IoU 0.6 with the first: goes
            [5.0, 5.0, 5.0, 5.0],  # empty
            [5.0, 5.0, 5.0, 5.0],  # empty and the same: 0 / 0 suppresses nothing
        ]
    )
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    assert nms(boxes, scores, iou_threshold=0.5, offset=0).tolist() == [0, 1, 3, 4]
    # With inclusive ends the empty boxes are one pixel, equal, and the second goes: 66/121 > 0.5 for box 1 too.
    assert nms(boxes, scores, iou_threshold=0.5, offset=1).tolist() == [0, 3]


def test_threshold_is_rounded_to_float32_like_the_compiled_argument() -> None:
    # IoU 3/5 in float32 is the float32 of 0.6, which is above the double 0.6: only a rounded threshold keeps it.
    boxes = torch.tensor([[0.0, 0.0, 5.0, 1.0], [0.0, 0.0, 3.0, 1.0]])
    assert float(np.float32(3) / np.float32(5)) > 0.6
    assert nms(boxes, torch.tensor([1.0, 0.5]), iou_threshold=0.6, offset=0).tolist() == [0, 1]


def test_infinite_and_nan_boxes_suppress_nothing_they_should_not() -> None:
    inf, nan = float("inf"), float("nan")
    boxes = torch.tensor(
        [[0.0, 0.0, inf, 10.0], [nan, 0.0, 5.0, 5.0], [0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 4.0]]
    )
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), iou_threshold=0.5, offset=0).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_equal_float32_of_the_same_values(dtype: torch.dtype) -> None:
    boxes, scores = boxes_on_grid(
        120, torch.Generator().manual_seed(3)
    )  # values below 128: exact in each dtype
    expected = nms(boxes, scores, iou_threshold=0.5, offset=0)
    assert torch.equal(nms(boxes.to(dtype), scores.to(dtype), iou_threshold=0.5, offset=0), expected)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float16, 2047.0), (torch.bfloat16, 255.0)])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, width: float) -> None:
    # The IoU is just above a half; with the sum of the areas rounded to `dtype` it would be exactly a half.
    half = (width + 1) / 2
    boxes = torch.tensor([[0.0, 0.0, width, 1.0], [0.0, 0.0, half, 1.0]], dtype=dtype)
    area = boxes[:, 2]
    assert area[1] / (area[0] + area[1] - area[1]) == 0.5
    assert nms(boxes, torch.tensor([0.9, 0.1], dtype=dtype), iou_threshold=0.5, offset=0).tolist() == [0]


def test_no_boxes() -> None:
    kept = nms(torch.empty(0, 4), torch.empty(0), iou_threshold=0.5, offset=0)
    assert kept.dtype == torch.long
    assert kept.shape == (0,)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"boxes \[N, 4\] and scores \[N\], got \(3, 5\) and \(3,\)"):
        nms(torch.zeros(3, 5), torch.zeros(3), iou_threshold=0.5, offset=0)
    with pytest.raises(ValueError, match=r"got \(3, 4\) and \(2,\)"):
        nms(torch.zeros(3, 4), torch.zeros(2), iou_threshold=0.5, offset=0)


def test_torchvision_route_keeps_mmcv_ties_and_threshold() -> None:
    calls = []

    def like_torchvision(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        """torchvision's contract, with ties in the opposite order to show that none reach it."""
        calls.append(threshold)
        reverse = torch.arange(len(scores) - 1, -1, -1)
        kept = brute_force(boxes[reverse], scores[reverse], threshold, 0)
        return reverse[torch.tensor(kept, dtype=torch.long)]

    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        boxes, scores = boxes_on_grid(60, generator)
        routed = nms(boxes, scores, iou_threshold=0.6, offset=0, torchvision_nms=like_torchvision)
        assert routed.tolist() == brute_force(boxes, scores, 0.6, 0)
        inclusive = nms(boxes, scores, iou_threshold=0.6, offset=1, torchvision_nms=like_torchvision)
        assert inclusive.tolist() == brute_force(boxes, scores, 0.6, 1)
    assert calls == [float(np.float32(0.6))] * 5  # never for offset 1, which torchvision cannot do


def test_mmcv_nms_filters_and_limits() -> None:
    from mmcv.ops import nms as mmcv_nms

    boxes, scores = boxes_on_grid(80, torch.Generator().manual_seed(5), degenerate=False)
    dets, kept = mmcv_nms(boxes, scores, iou_threshold=0.5, score_threshold=0.25, max_num=7)
    valid = (scores > 0.25).nonzero().flatten()
    expected = valid[torch.tensor(brute_force(boxes[valid], scores[valid], 0.5, 0))][:7]
    assert torch.equal(kept, expected)
    assert torch.equal(dets, torch.cat([boxes[expected], scores[expected, None]], dim=1))
    dets_numpy, kept_numpy = mmcv_nms(
        boxes.numpy(), scores.numpy(), iou_threshold=0.5, score_threshold=0.25, max_num=7
    )
    assert isinstance(dets_numpy, np.ndarray)
    assert np.array_equal(kept_numpy, expected.numpy())
    assert np.array_equal(dets_numpy, dets.numpy())


@pytest.mark.parametrize("split_thr", [10_000, 50])
def test_batched_nms_is_nms_within_each_class(split_thr: int) -> None:
    from mmcv.ops import batched_nms

    generator = torch.Generator().manual_seed(6)
    boxes, _ = boxes_on_grid(150, generator, degenerate=False)
    scores = torch.randperm(150, generator=generator) / 150  # no ties: the order across classes is unique
    labels = torch.randint(0, 3, (150,), generator=generator)
    expected = []
    for label in range(3):
        members = (labels == label).nonzero().flatten()
        expected += members[torch.tensor(brute_force(boxes[members], scores[members], 0.5, 0))].tolist()
    expected.sort(key=lambda i: -float(scores[i]))
    dets, kept = batched_nms(boxes, scores, labels, dict(type="nms", iou_threshold=0.5, split_thr=split_thr))
    assert kept.tolist() == expected
    assert torch.equal(dets, torch.cat([boxes[kept], scores[kept, None]], dim=1))


def test_batched_nms_class_agnostic_and_without_nms() -> None:
    from mmcv.ops import batched_nms

    generator = torch.Generator().manual_seed(7)
    boxes, _ = boxes_on_grid(100, generator, degenerate=False)
    scores = torch.randperm(100, generator=generator) / 100
    labels = torch.randint(0, 3, (100,), generator=generator)
    _, kept = batched_nms(boxes, scores, labels, dict(type="nms", iou_threshold=0.5), class_agnostic=True)
    assert kept.tolist() == brute_force(boxes, scores, 0.5, 0)
    _, everything = batched_nms(boxes, scores, labels, None)
    assert everything.tolist() == scores.argsort(descending=True).tolist()


def test_identical_to_compiled_mmcv(compiled_operators) -> None:
    """A thousand random sets: every third on a grid (touching and equal boxes), every other with tied scores, some inverted."""
    generator = torch.Generator().manual_seed(8)
    sets = removed = 0
    for trial in range(1000):
        n = 3000 if trial == 0 else int(torch.randint(0, 160, (1,), generator=generator))
        corner = torch.rand(n, 2, generator=generator) * (100 if trial == 0 else 50)
        size = torch.rand(n, 2, generator=generator) * 40 - 5 * (trial % 7 == 0)
        if trial % 3 == 0:
            corner, size = corner // 4 * 4, size // 8 * 8
        boxes = torch.cat([corner, corner + size], dim=1)
        scores = torch.rand(n, generator=generator)
        if trial % 2:
            scores = (scores * 8).round() / 8
        threshold = (0.3, 0.5, 0.6)[trial // 2 % 3]
        for offset in (0, 1):
            compiled = compiled_operators.nms(boxes, scores, iou_threshold=threshold, offset=offset)
            ours = nms(boxes, scores, iou_threshold=threshold, offset=offset)
            assert torch.equal(compiled, ours), (trial, n, threshold, offset)
            sets, removed = sets + 1, removed + n - len(ours)
    assert sets == 2000
    assert removed > 25_000  # the sets are crowded enough for the comparison to mean something


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("split_thr", [10_000, 100])
@pytest.mark.parametrize("kind", ["nms", "soft_nms"])
def test_batched_nms_identical_to_compiled_mmcv(
    kind, split_thr, class_agnostic, monkeypatch, compiled_operators
) -> None:
    from mmcv.ops import batched_nms

    generator = torch.Generator().manual_seed(9)
    for trial in range(4):
        boxes, scores = boxes_on_grid(250, generator, degenerate=bool(trial % 2))
        boxes += torch.rand(boxes.shape, generator=generator)
        labels = torch.randint(0, 5, (250,), generator=generator)
        config = dict(type=kind, iou_threshold=0.5, split_thr=split_thr)
        if kind == "nms":
            config["max_num"] = 60
        found = []
        for extension in (plain_extension(monkeypatch), compiled_operators):
            serve(monkeypatch, extension)
            found.append(batched_nms(boxes, scores, labels, config, class_agnostic=class_agnostic))
        (dets, kept), (compiled_dets, compiled_kept) = found
        assert torch.equal(kept, compiled_kept)
        assert torch.equal(dets, compiled_dets)
        assert 0 < len(kept) < 250
