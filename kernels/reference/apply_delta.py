"""Packed perturbations added to images, an image at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .delta_codes import unpack_rows


def forward(
    images: Tensor,
    records: Sequence[Tensor],
    cells: Sequence[int],
    x_cell: Sequence[Tensor],
    y_cell: Sequence[Tensor],
    bits: int,
    levels: int,
    spacing: float,
    grey_level: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    clean: bool,
) -> tuple[Tensor, Tensor]:
    """(perturbed, clean or empty); ``cells``: Hc, Wc of every image in a row; ``mean``, ``std``: empty for none."""
    pixels = not images.dtype.is_floating_point
    out = torch.empty_like(images, dtype=dtype)
    plain = torch.empty_like(out) if clean else out.new_empty(0)
    channels = images.shape[1]
    for n, record in enumerate(records):
        rows, columns = _inside(y_cell[n]), _inside(x_cell[n])
        if pixels:
            out[n].zero_()
            if clean:
                plain[n].zero_()
        else:
            out[n].copy_(images[n])
        if rows is None or columns is None:
            continue
        packed = record.view(channels, cells[2 * n], -1)
        y, x = y_cell[n][rows], x_cell[n][columns]
        outside = _outside(y, x)
        for c in range(channels):
            target, source = out[n, c, rows, columns], images[n, c, rows, columns]
            codes = _gather(_gather(packed[c], y, 0), x, 1, bits)
            b = source.to(torch.promote_types(images.dtype, torch.float32))
            delta = codes.to(b.dtype).sub_(levels // 2).mul_(spacing)
            if pixels:
                moved = delta.add_(b).clamp_(0.0, 255.0)
                pairs = ((target, moved), (plain[n, c, rows, columns], b)) if clean else ((target, moved),)
                for place, value in pairs:
                    value = value.sub_(mean[c]).div_(std[c]) if mean else value
                    place.copy_(value if outside is None else value.masked_fill_(outside, 0.0))
            else:
                moved = delta.mul_(grey_level[c]).add_(b)
                moved = torch.minimum(torch.maximum(moved, b.clamp(max=low[c])), b.clamp(min=high[c]))
                target.copy_(moved if outside is None else torch.where(outside, b, moved))
    return out, plain


def _inside(cell: Tensor) -> slice | None:
    """The part of an axis from its first to its last pixel that has a cell."""
    found = (cell >= 0).nonzero()
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else None


def _outside(y: Tensor, x: Tensor) -> Tensor | None:
    """``[H, W]`` bool: pixels between others that have no cell; None where there are none."""
    if int(y.min()) >= 0 and int(x.min()) >= 0:
        return None
    return (y < 0)[:, None] | (x < 0)


def _gather(source: Tensor, index: Tensor, dim: int, bits: int = 8) -> Tensor:
    """Rows (0) of bytes, or columns (1) of codes; a run of neighbours is a view."""
    if dim == 1:
        source = unpack_rows(source, bits)
    first, last, n = int(index[0]), int(index[-1]), len(index)
    if first >= 0 and abs(last - first) == n - 1:
        sign = 1 if last >= first else -1
        if bool((index.diff() == sign).all()):
            part = source.narrow(dim, min(first, last), n)
            return part if sign == 1 else part.flip(dim)
    return source.index_select(dim, index.clamp(min=0).to(source.device))
