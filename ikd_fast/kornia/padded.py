"""Boxes as kornia's users have them: padded ``[N, M, 4]``, lists, ``Boxes``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kornia.geometry.boxes import Boxes
from torch import Tensor


@dataclass
class PaddedBoxes:
    """``edges``: ``[N, M, 4]`` xyxy edges. ``valid``: bool ``[N, M]``, rows that are boxes. ``source``: as they came."""

    edges: Tensor
    valid: Tensor
    source: Any
    mode: str

    @classmethod
    def of(cls, boxes: Any, keep: Tensor | None, mode: str, n: int) -> PaddedBoxes:
        """Read boxes of ``n`` images in ``mode`` ("xyxy" edges or "xyxy_plus" pixel centres); ``Boxes`` know theirs."""
        given = boxes
        if isinstance(boxes, Boxes):
            mode, boxes = "xyxy", boxes.to_tensor("xyxy")
        if isinstance(boxes, (list, tuple)):
            edges, valid = _padded(boxes, n)
        elif isinstance(boxes, Tensor):
            edges = boxes
            valid = torch.ones(boxes.shape[:-1], dtype=torch.bool, device=boxes.device)
            if isinstance(given, Boxes):
                valid = (boxes[..., 2:] > boxes[..., :2]).all(-1)  # kornia exports filtered rows as zeros
        else:
            raise TypeError(
                f"bbox_xyxy: expected a tensor, a list of tensors or kornia Boxes, got {type(boxes).__name__}"
            )
        if edges.dim() == 2:
            edges, valid = edges[None], valid[None]
        if edges.dim() != 3 or edges.shape[-1] != 4 or len(edges) != n:
            raise ValueError(f"bbox_xyxy: expected [{n}, M, 4] for {n} images, got {list(edges.shape)}")
        if keep is not None:
            if keep.dtype != torch.bool or keep.numel() != valid.numel():
                raise ValueError(
                    f"keep: expected bool {list(valid.shape)}, got {keep.dtype} {list(keep.shape)}"
                )
            valid = valid & keep.reshape(valid.shape).to(valid.device)
        return cls(_shifted(edges, mode, 1), valid, given, mode)

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """For each image its boxes ``[n_i, 4]`` and which of the M rows they are."""
        return [(e[v], v.nonzero().flatten()) for e, v in zip(self.edges, self.valid, strict=True)]

    def rebuild(self, boxes: Sequence[Tensor], rows: Sequence[Tensor]) -> tuple[Any, Tensor]:
        """New boxes, given with the rows they belong in, in the form of ``source``; and which rows are boxes now."""
        stays = torch.zeros_like(self.valid)
        edges = torch.zeros_like(self.edges)
        for i, (box, row) in enumerate(zip(boxes, rows, strict=True)):
            stays[i, row] = True
            edges[i, row] = _shifted(box, self.mode, -1).to(edges.dtype)
        kept = [e[s] for e, s in zip(edges, stays, strict=True)]
        if isinstance(self.source, Boxes):
            single = self.source.data.dim() == 3
            return Boxes.from_tensor(kept[0] if single else kept, mode="xyxy"), stays
        if isinstance(self.source, (list, tuple)):
            return kept, stays
        return edges.reshape(self.source.shape), stays


def _shifted(boxes: Tensor, mode: str, sign: int) -> Tensor:
    """Between centres and edges: the last pixel's far edge is one beyond its centre."""
    if mode == "xyxy":
        return boxes
    out = boxes.clone()
    out[..., 2:] += sign
    return out


def _padded(boxes: Sequence[Tensor], n: int) -> tuple[Tensor, Tensor]:
    if len(boxes) != n:
        raise ValueError(f"bbox_xyxy: expected a list of {n}, one for each image, got {len(boxes)}")
    most = max((len(b) for b in boxes), default=0)
    first = boxes[0] if boxes else torch.zeros(0, 4)
    edges = first.new_zeros(n, most, 4)
    valid = torch.zeros(n, most, dtype=torch.bool, device=first.device)
    for i, box in enumerate(boxes):
        edges[i, : len(box)] = box.reshape(-1, 4)
        valid[i, : len(box)] = True
    return edges, valid
