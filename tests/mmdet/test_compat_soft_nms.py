"""soft_nms through mmcv.ops: by hand, against a float64 loop, and against compiled mmcv."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import ikd_fast.mmdet  # noqa: F401  activates compat before mmcv.ops is imported
from ikd_fast.mmdet.compat.soft_nms import METHODS, softnms
from tests.mmdet.operator_truth import plain_extension, serve


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, plain_extension(monkeypatch))


def crowded(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    corner = torch.rand(n, 2, generator=generator) * 60
    size = torch.rand(n, 2, generator=generator) * 40 + 2
    return torch.cat([corner, corner + size], 1), torch.rand(n, generator=generator)


def by_loop(
    boxes: Tensor, scores: Tensor, threshold: float, sigma: float, lowest: float, method: str, offset: int
) -> dict[int, float]:
    """Score by index, in the order taken; float64, no score twice."""
    b = boxes.double().tolist()
    left = dict(enumerate(scores.double().tolist()))
    taken: dict[int, float] = {}
    while left:
        i = max(left, key=left.__getitem__)
        taken[i] = left.pop(i)
        for j in list(left):
            w = max(0.0, min(b[i][2], b[j][2]) - max(b[i][0], b[j][0]) + offset)
            h = max(0.0, min(b[i][3], b[j][3]) - max(b[i][1], b[j][1]) + offset)
            area_i, area_j = ((k[2] - k[0] + offset) * (k[3] - k[1] + offset) for k in (b[i], b[j]))
            iou = w * h / (area_i + area_j - w * h)
            if method == "gaussian":
                left[j] *= math.exp(-iou * iou / sigma)
            elif iou >= threshold:
                left[j] *= 1 - iou if method == "linear" else 0.0
            if left[j] < lowest:
                del left[j]
    return taken


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_float64_loop(method: str, offset: int) -> None:
    from mmcv.ops import soft_nms

    generator = torch.Generator().manual_seed(11)
    for n in (1, 2, 30, 80):
        boxes, scores = crowded(n, generator)
        dets, inds = soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
        expected = by_loop(boxes, scores, 0.3, 0.5, 0.05, method, offset)
        assert inds.tolist() == list(expected)
        assert torch.equal(dets[:, :4], boxes[inds])
        # A product of up to 80 float32 factors.
        torch.testing.assert_close(
            dets[:, 4].double(), torch.tensor(list(expected.values()), dtype=torch.float64), rtol=2e-5, atol=0
        )


def test_by_hand() -> None:
    from mmcv.ops import soft_nms

    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [20, 0, 30, 10], [0, 0, 10, 1]])
    scores = torch.tensor([1.0, 0.75, 0.5, 0.25])  # IoU with the first: 0.5, 0 and 0.1
    dets, inds = soft_nms(boxes, scores, 0.3, method="linear")
    # The tie at 0.25 after the second box was halved twice over falls to the one that lies first.
    assert inds.tolist() == [0, 2, 1, 3]
    assert dets[:, 4].tolist() == [1.0, 0.5, 0.375, 0.25]
    dets, inds = soft_nms(boxes, scores, 0.3, method="naive")
    assert inds.tolist() == [0, 2, 3]
    _, inds = soft_nms(boxes, scores, 0.3, method="linear", min_score=0.4)
    assert inds.tolist() == [0, 2]
    numpy_dets, numpy_inds = soft_nms(boxes.numpy(), scores.numpy(), 0.3, method="naive")
    assert isinstance(numpy_dets, np.ndarray)
    assert numpy_inds.tolist() == [0, 2, 3]


def test_no_boxes_and_other_dtypes() -> None:
    from mmcv.ops import soft_nms

    dets, inds = soft_nms(torch.empty(0, 4), torch.empty(0))
    assert (dets.shape, inds.shape, inds.dtype) == ((0, 5), (0,), torch.long)
    boxes, scores = crowded(20, torch.Generator().manual_seed(12))
    exact, _ = soft_nms(boxes.double(), scores.double(), method="gaussian")
    assert exact.dtype == torch.float64
    half, _ = soft_nms(boxes.half(), scores.half(), method="gaussian")
    single, _ = soft_nms(boxes.half().float(), scores.half().float(), method="gaussian")
    assert torch.equal(half, single.half())


def test_wrong_input_is_named() -> None:
    boxes, scores = crowded(3, torch.Generator().manual_seed(13))
    with pytest.raises(ValueError, match=r"dets \[N, 5\], got \(3, 4\), \(3,\) and \(3, 4\)"):
        softnms(boxes, scores, torch.empty(3, 4), 0.3, 0.5, 0.0, 1, 0)
    with pytest.raises(ValueError, match=r"0 \(naive\), 1 \(linear\) or 2 \(gaussian\), got 3"):
        softnms(boxes, scores, torch.empty(3, 5), 0.3, 0.5, 0.0, 3, 0)


@pytest.mark.parametrize("method", range(3))
def test_identical_to_compiled_mmcv(method: int, compiled_operators) -> None:
    """Tied scores, equal, touching, empty and inverted boxes among the sets; indices are identical, and scores but for exp."""
    generator = torch.Generator().manual_seed(14)
    dropped = 0
    for trial in range(60):
        n = 400 if trial == 0 else int(torch.randint(0, 60, (1,), generator=generator))
        boxes, scores = crowded(n, generator)
        if trial % 3 == 0:
            boxes = boxes // 8 * 8
        if trial % 5 == 0:
            boxes[: n // 4, 2:] = boxes[: n // 4, :2] - 4 * (trial % 2)
        if trial % 2:
            scores = (scores * 4).round() / 4
        for offset in (0, 1):
            found = []
            for operator in (softnms, compiled_operators.softnms):
                dets = torch.full((n, 5), -7.0)
                inds = operator(
                    boxes, scores, dets, iou_threshold=0.3, sigma=0.5, min_score=0.05, method=method, offset=offset
                )  # fmt: skip
                found.append((dets, inds))
            (dets, inds), (compiled_dets, compiled_inds) = found
            assert torch.equal(inds, compiled_inds), (trial, offset)
            # Rows after the last one taken are the compiled loop's leftovers, which mmcv cuts off.
            # Between two empty boxes the IoU is 0 / 0, and in the gaussian form so is the score. The C library's
            # float32 exponential is rightly rounded in all but some of a thousand cases.
            torch.testing.assert_close(
                dets[: len(inds)],
                compiled_dets[: len(inds)],
                rtol=1e-6 if METHODS[method] == "gaussian" else 0,
                atol=0,
                equal_nan=True,
            )
            dropped += n - len(inds)
    assert dropped > 300
