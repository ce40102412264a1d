"""A signed gradient step of packed perturbations, an image at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .delta_codes import pack_rows, unpack_rows


def forward(
    gradient: Tensor,
    records: Sequence[Tensor],
    cells: Sequence[int],
    x_span: Sequence[Tensor],
    y_span: Sequence[Tensor],
    bits: int,
    levels: int,
    spacing: float,
    step: Tensor,
) -> list[Tensor]:
    """New records; ``cells``: Hc, Wc of every image in a row."""
    channels = gradient.shape[1]
    # Wide enough for a code and a step; torch.where would take longer than all the rest.
    small = torch.int8 if levels < 64 else torch.int16
    out = []
    for n, record in enumerate(records):
        packed = record.view(channels, cells[2 * n], -1).clone()
        out.append(packed.view(-1))
        rows, columns = _touched(y_span[n]), _touched(x_span[n])
        if rows is None or columns is None:
            continue
        y, x, moves = y_span[n][rows], x_span[n][columns], whole_levels(step[n], levels, spacing).to(small)
        for c in range(channels):  # what is made on the way stays near the cache
            total = _span_sums(gradient[n, c : c + 1], y, x)[0]
            move = total.sign().to(small).mul_(moves)  # the sign of NaN is 0
            codes = unpack_rows(packed[c, rows], bits)
            before = codes[:, columns].to(small)
            # Beyond the last level only what is there and stays.
            after = torch.minimum(before + move, before.clamp(min=levels - 1)).clamp_(min=0)
            codes[:, columns] = after.to(torch.uint8)
            packed[c, rows] = pack_rows(codes, bits)
    return out


def whole_levels(step: Tensor, levels: int, spacing: float) -> Tensor:
    """A step in grey levels to the nearest whole number of levels, halves away from 0, at most ``levels``."""
    size = (step.to(torch.float32).abs() * (1.0 / spacing) + 0.5).floor_().clamp_(max=levels)
    return torch.where(step < 0, -size, size).nan_to_num_(nan=0.0)


def _touched(span: Tensor) -> slice | None:
    """The part of an axis from the first to the last cell whose span is not empty."""
    found = (span[:, 1] > span[:, 0]).nonzero()
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else None


def _span_sums(gradient: Tensor, y_span: Tensor, x_span: Tensor) -> Tensor:
    """``[C, h, w]`` float32 sums over each cell's rows and columns, rows outside, in their order; 0 where empty."""
    work = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if (y := _run(y_span)) is not None and (x := _run(x_span)) is not None:
        part = work[:, y[0], x[0]]
        turned = [dim for dim, axis in ((1, y), (2, x)) if axis[1]]
        return part.flip(turned) if turned else part
    y_start, y_count = _start_count(y_span, gradient.device)
    x_start, x_count = _start_count(x_span, gradient.device)
    total = work.new_zeros(len(work), len(y_span), len(x_span))
    for i in range(int((y_span[:, 1] - y_span[:, 0]).max())):
        rows = work.index_select(1, torch.where(i < y_count, y_start + i, 0))
        for j in range(int((x_span[:, 1] - x_span[:, 0]).max())):
            term = rows.index_select(2, torch.where(j < x_count, x_start + j, 0))
            empty = (i >= y_count)[:, None] | (j >= x_count)
            total.add_(term.masked_fill_(empty, 0.0))
    return total


def _run(span: Tensor) -> tuple[slice, bool] | None:
    """(pixels, mirrored) where every cell has one pixel and neighbours have neighbours; else None."""
    start, n = span[:, 0], len(span)
    if bool((span[:, 1] - start != 1).any()):
        return None
    first, last = int(start[0]), int(start[-1])
    sign = 1 if last >= first else -1
    if bool((start.diff() != sign).any()):
        return None
    return slice(min(first, last), min(first, last) + n), sign == -1


def _start_count(span: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    return span[:, 0].to(device), (span[:, 1] - span[:, 0]).to(device)
