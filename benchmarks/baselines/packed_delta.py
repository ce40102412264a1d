"""Packed perturbations in plain PyTorch, an image at a time, and the maps that both sides get."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ikd_fast.kernels import CellMap, DeltaCodes

Size = tuple[int, int]


def straight_map(size: Size, frame: Size, mirrored: bool) -> CellMap:
    """An image at the top left of a padded frame, a cell a pixel."""
    tables = []
    for n, full, mirror in zip(size, frame, (False, mirrored), strict=True):
        order = torch.arange(n, dtype=torch.int32)
        order = order.flip(0) if mirror else order
        cell = torch.full((full,), -1, dtype=torch.int32)
        cell[:n] = order
        tables.append((cell, torch.stack([order, order + 1], 1)))
    (y_cell, y_span), (x_cell, x_span) = tables
    return CellMap(size, x_cell, y_cell, x_span, y_span)


def _unpack(record: Tensor, size: Size, mirrored: bool) -> Tensor:
    """4-bit codes ``[3, H, W]`` in the view."""
    rows = record.view(3, size[0], -1)
    codes = torch.stack([rows & 15, rows >> 4], -1).flatten(-2)[..., : size[1]]
    return codes.flip(-1) if mirrored else codes


def plain_apply(
    images: Tensor,
    records: Sequence[Tensor],
    size: Size,
    mirrored: Sequence[bool],
    codes: DeltaCodes,
    grey_level: Tensor,
    low: Tensor,
    high: Tensor,
) -> Tensor:
    """``grey_level``, ``low``, ``high``: float32 ``[3, 1, 1]``."""
    out, (h, w) = images.clone(), size
    for target, record, mirror in zip(out, records, mirrored, strict=True):
        x = target[:, :h, :w].float()
        value = (_unpack(record, size, mirror).float() - codes.levels // 2) * codes.spacing
        moved = torch.maximum(x + grey_level * value, torch.minimum(low, x))
        target[:, :h, :w] = torch.minimum(moved, torch.maximum(high, x))
    return out


def plain_step(
    gradient: Tensor,
    records: Sequence[Tensor],
    size: Size,
    mirrored: Sequence[bool],
    codes: DeltaCodes,
    step: Tensor,
) -> list[Tensor]:
    """Steps of whole levels."""
    out, (h, w) = [], size
    for g, record, mirror, move in zip(gradient, records, mirrored, step / codes.spacing, strict=True):
        change = (g[:, :h, :w].sign() * move).to(torch.int8)
        before = _unpack(record, size, mirror).to(torch.int8)
        after = (before + change).clamp(0, codes.levels - 1).to(torch.uint8)
        after = after.flip(-1) if mirror else after
        after = torch.nn.functional.pad(after, (0, w % 2))
        out.append((after[..., 0::2] | after[..., 1::2] << 4).flatten())
    return out
