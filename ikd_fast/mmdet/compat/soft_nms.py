"""Soft non-maximum suppression with the semantics of mmcv's compiled operator."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

METHODS = ("naive", "linear", "gaussian")


def _first_highest(scores: np.ndarray) -> int:
    """Position of the maximum, found by ``>`` from the first on: NaN wins only from the first place."""
    if np.isnan(scores[0]):
        return 0
    return int(np.argmax(np.where(np.isnan(scores), -np.inf, scores)))


def _factor(iou: np.ndarray, method: int, iou_threshold: np.floating, sigma: np.floating) -> np.ndarray:
    if method == 2:
        # The exponential is taken in float64 and rounded once: the C library's float32 one is nearly that exact.
        return np.exp((-(iou * iou) / sigma).astype(np.float64)).astype(iou.dtype)
    one = iou.dtype.type(1)
    return np.where(iou >= iou_threshold, one - iou if method == 1 else one - one, one)


def _without(order: np.ndarray, gone: np.ndarray) -> np.ndarray:
    """Remove entries as the compiled loop does: each hole, from the front, takes the last entry still there."""
    left = len(order) - int(gone.sum())
    holes = np.flatnonzero(gone[:left])
    movers = left + np.flatnonzero(~gone[left:])[::-1]
    order[holes] = order[movers]
    return order[:left]


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Rescored boxes into ``dets``, their indices returned; the drop-in for ``mmcv._ext.softnms``.

    Again and again the box with the highest score is taken and the scores of the others are multiplied: by 0 (naive)
    or ``1 - IoU`` (linear) where ``IoU >= iou_threshold``, or by ``exp(-IoU^2 / sigma)`` (gaussian); boxes whose score
    falls below ``min_score`` are dropped (Bodla et al., "Soft-NMS -- Improving Object Detection With One Line of
    Code"). The arithmetic is float32 (float64 for float64 boxes), and equal scores fall in the compiled loop's order.

    Args:
        boxes: [N, 4] as (x1, y1, x2, y2), on the CPU.
        scores: [N].
        dets: [N, 5]; the first K rows are overwritten with (x1, y1, x2, y2, score), by the order in which they were
            taken.
        method: 0 naive, 1 linear, 2 gaussian.
        offset: 0, or 1 for boxes whose ends are inclusive pixel indices.

    Returns:
        int64 [K].

    >>> boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 5.], [20., 0., 30., 10.]])
    >>> dets = torch.empty(3, 5)
    >>> softnms(boxes, torch.tensor([0.5, 1.0, 0.25]), dets, 0.3, 0.5, 1e-3, method=1, offset=0)
    tensor([1, 0, 2])
    >>> dets[:, 4]
    tensor([1.0000, 0.2500, 0.2500])
    """
    if (
        boxes.dim() != 2
        or boxes.size(1) != 4
        or scores.shape != boxes.shape[:1]
        or dets.shape != (len(boxes), 5)
    ):
        raise ValueError(
            f"softnms expects boxes [N, 4], scores [N] and dets [N, 5], got {tuple(boxes.shape)}, "
            f"{tuple(scores.shape)} and {tuple(dets.shape)}"
        )
    if method not in range(len(METHODS)):
        raise ValueError(f"softnms expects method 0 (naive), 1 (linear) or 2 (gaussian), got {method}")
    dtype = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    x1, y1, x2, y2 = boxes.detach().cpu().to(dtype).numpy().T.copy()
    score = scores.detach().cpu().to(dtype).numpy().copy()
    # The compiled operator takes these as float32, whatever the boxes.
    threshold, sigma32, lowest = (np.float32(v) for v in (iou_threshold, sigma, min_score))
    area = (x2 - x1 + offset) * (y2 - y1 + offset)
    taken: list[int] = []
    order = np.arange(len(boxes))
    with np.errstate(all="ignore"):  # 0 / 0 between empty boxes is NaN, which suppresses nothing
        while len(order):
            best = _first_highest(score[order])
            i = order[best]
            order[best] = order[0]
            order = order[1:]
            taken.append(int(i))
            width = np.minimum(x2[i], x2[order]) - np.maximum(x1[i], x1[order]) + offset
            height = np.minimum(y2[i], y2[order]) - np.maximum(y1[i], y1[order]) + offset
            inter = np.maximum(width, 0) * np.maximum(height, 0)
            iou = inter / (area[i] + area[order] - inter)
            score[order] *= _factor(iou, method, threshold, sigma32)
            order = _without(order, score[order] < lowest)
    inds = torch.tensor(taken, dtype=torch.long)
    final = np.stack([x1, y1, x2, y2, score], axis=1)[taken]
    dets[: len(taken)] = torch.from_numpy(final).to(dets.dtype)
    return inds
