"""Momentum of mode ``carry``: a velocity for each cell of a record, kept beside the perturbation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ikd_fast.kernels import CellMap

from .memory import Record


def accelerate(
    gradient: Tensor,
    length: Tensor,
    records: Sequence[Record],
    maps: Sequence[CellMap],
    sizes: Sequence[tuple[int, int]],
    momentum: float,
) -> tuple[Tensor, list[CellMap], list[Record]]:
    """Move the velocities by a gradient; a step then follows their sign.

    v <- mu v + V^T g / mean|g| on the cells that the view touches (M-DI2-FGSM's accumulation); the others keep theirs.

    Args:
        gradient: ``[N, C, H, W]`` in network pixels.
        length: ``[N]``, sum of |gradient|; where it is 0 or not finite the velocity stays.
        records: with ``velocity`` float16 ``[C, Hc, Wc]``.
        maps: view pixel to cell.
        sizes: (h, w) of the images without padding, over which mean|g| is taken.
    Returns:
        the velocities of the touched cells, 0 elsewhere, ``[N, C, max Hc, max Wc]`` float32; maps that say that its pixels are
        the cells; the records with their new velocity.
    """
    n, channels = gradient.shape[:2]
    tall, wide = max(m.cells[0] for m in maps), max(m.cells[1] for m in maps)
    fields = gradient.new_zeros(n, channels, tall, wide, dtype=torch.float32)
    good = length.isfinite() & (length > 0)
    moved = []
    for i, (record, place) in enumerate(zip(records, maps, strict=True)):
        if record.velocity is None:
            raise ValueError(
                "momentum needs records with a velocity, got one without: they are of an attack with momentum=0"
            )
        h, w = place.cells
        touched = (_touched(place.y_span)[:, None] & _touched(place.x_span)[None, :]).to(
            gradient.device, non_blocking=True
        )
        pixels = channels * sizes[i][0] * sizes[i][1]
        push = cell_gradient(gradient[i], place) / (length[i] / pixels).clamp_min(1e-30)
        old = record.velocity.float()
        new = torch.where(touched & good[i], momentum * old + push, old)
        fields[i, :, :h, :w] = torch.where(touched, new, 0)
        moved.append(replace(record, velocity=new.clamp(-6e4, 6e4).half()))
    return fields, [_cells_themselves(m.cells, (tall, wide)) for m in maps], moved


def cell_gradient(gradient: Tensor, place: CellMap) -> Tensor:
    """``[C, H, W]`` over view pixels to ``[C, Hc, Wc]`` over cells, float32: the sum over the pixels of each cell's span."""
    sums = _span_sums(gradient.double(), place.x_span)
    return _span_sums(sums.transpose(1, 2), place.y_span).transpose(1, 2).float()


def _span_sums(values: Tensor, span: Tensor) -> Tensor:
    """``[..., L]`` to ``[..., cells]``: differences of running sums."""
    running = F.pad(values.cumsum(-1), (1, 0))
    ends = span.to(values.device, torch.int64, non_blocking=True)
    return running.index_select(-1, ends[:, 1]) - running.index_select(-1, ends[:, 0])


def _touched(span: Tensor) -> Tensor:
    return span[:, 1] > span[:, 0]


def _cells_themselves(cells: tuple[int, int], frame: tuple[int, int]) -> CellMap:
    """The map under which a pixel is a cell, in a frame that may be larger."""
    axes = []
    for count, size in zip(cells, frame, strict=True):
        index = torch.full((size,), -1, dtype=torch.int32, device="cpu")
        index[:count] = torch.arange(count, device="cpu")
        first = torch.arange(count, dtype=torch.int32, device="cpu")
        axes.append((index, torch.stack([first, first + 1], dim=1)))
    (y_cell, y_span), (x_cell, x_span) = axes
    return CellMap(cells=cells, x_cell=x_cell, y_cell=y_cell, x_span=x_span, y_span=y_span)
