"""Greedy non-maximum suppression with the semantics of mmcv's compiled operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# Rows of the overlap matrix held at once; bounds the memory to BLOCK * N floats.
BLOCK = 512


def _overlaps(a: Tensor, area_a: Tensor, b: Tensor, area_b: Tensor, offset: int) -> Tensor:
    """Pairwise IoU [len(a), len(b)], every step rounded in the order of the compiled loop."""
    width = torch.minimum(a[:, None, 2], b[None, :, 2]).sub_(torch.maximum(a[:, None, 0], b[None, :, 0]))
    height = torch.minimum(a[:, None, 3], b[None, :, 3]).sub_(torch.maximum(a[:, None, 1], b[None, :, 1]))
    inter = width.add_(offset).clamp_(min=0).mul_(height.add_(offset).clamp_(min=0))
    return inter / (area_a[:, None] + area_b[None, :] - inter)


def _greedy(suppresses: np.ndarray) -> np.ndarray:
    """Rows kept when every kept row removes the later rows it suppresses."""
    removed = np.zeros(len(suppresses), dtype=bool)
    for row in range(len(suppresses)):
        if not removed[row]:
            removed[row + 1 :] |= suppresses[row, row + 1 :]
    return ~removed


def _nms_sorted(boxes: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Kept positions, ascending, of boxes already sorted by falling score. One host sync a block."""
    areas = (boxes[:, 2] - boxes[:, 0] + offset) * (boxes[:, 3] - boxes[:, 1] + offset)
    alive = torch.arange(len(boxes), device=boxes.device)
    kept = []
    while len(alive):
        head, tail = alive[:BLOCK], alive[BLOCK:]
        inside = _overlaps(boxes[head], areas[head], boxes[head], areas[head], offset) > iou_threshold
        chosen = head[torch.from_numpy(_greedy(inside.cpu().numpy())).to(head.device)]
        kept.append(chosen)
        across = _overlaps(boxes[chosen], areas[chosen], boxes[tail], areas[tail], offset) > iou_threshold
        alive = tail[~across.any(dim=0)]
    return torch.cat(kept) if kept else alive


def nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int, torchvision_nms: Any = None
) -> Tensor:
    """Indices of the boxes kept, by falling score; the drop-in for ``mmcv._ext.nms``.

    Box ``j`` goes when an earlier kept box ``i`` has ``IoU(i, j) > iou_threshold`` (strictly), with widths
    ``x2 - x1 + offset``. As in the compiled operator the arithmetic is float32, the threshold is rounded to
    float32, equal scores keep the order of ``scores.sort(0, descending=True)``, and the undefined IoU of two
    empty boxes (0 / 0) suppresses nothing.

    Args:
        boxes: [N, 4] as (x1, y1, x2, y2). Half precision is computed in float32; float64 stays float64.
        scores: [N], same device as ``boxes``.
        iou_threshold: overlap above which the lower score goes.
        offset: 0, or 1 for boxes whose ends are inclusive pixel indices.
        torchvision_nms: ``torchvision.ops.nms``, used when ``offset`` is 0 (it knows no other).

    Returns:
        int64 [K].

    >>> boxes = torch.tensor([[0., 0., 10., 10.], [1., 0., 11., 10.], [20., 0., 30., 10.]])
    >>> nms(boxes, torch.tensor([0.2, 0.9, 0.5]), iou_threshold=0.5, offset=0)
    tensor([1, 2])
    """
    if boxes.dim() != 2 or boxes.size(1) != 4 or scores.shape != boxes.shape[:1]:
        raise ValueError(
            f"nms expects boxes [N, 4] and scores [N], got {tuple(boxes.shape)} and {tuple(scores.shape)}"
        )
    if boxes.device != scores.device:
        raise ValueError(
            f"nms expects boxes and scores on one device, got {boxes.device} and {scores.device}"
        )
    if boxes.numel() == 0:
        return torch.empty(0, dtype=torch.long, device=boxes.device)
    # The same call as the compiled operator, so ties fall alike.
    order = scores.sort(0, descending=True).indices
    boxes = boxes.detach()[order]
    if boxes.dtype != torch.float64:
        boxes = boxes.float()
    threshold = float(np.float32(iou_threshold))
    if torchvision_nms is not None and offset == 0:
        # Ranks instead of scores: torchvision sorts again, and its tie rule is not mmcv's.
        ranks = torch.arange(len(boxes), 0, -1, device=boxes.device).to(boxes.dtype)
        return order[torchvision_nms(boxes, ranks, threshold)]
    return order[_nms_sorted(boxes, threshold, int(offset))]
