"""One signed step of an image perturbation and its projection, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Elements of one piece on a CPU: what the passes over each piece work on stays near the core.
PIECE = 1 << 17


def forward(
    delta: Tensor,
    direction: Tensor | None,
    images: Tensor,
    moves: Tensor | None,
    frames: Sequence[Sequence[int]] | None,
    step: Sequence[float],
    radius: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
) -> Tensor:
    """The new perturbation. ``frames``: (h, w) of each image; ``step`` and the others: a number for each channel."""
    out = torch.empty_like(delta)
    on_host = delta.device.type == "cpu"
    moving = moves.tolist() if on_host and moves is not None else [True] * len(delta)
    for index, numbers in _pieces(delta, step, radius, low, high):
        piece, x = out[index], images[index].to(delta.dtype)
        by, bound, floor, ceiling = numbers
        if direction is not None and (not on_host or moving[index[0]]):
            torch.sign(direction[index].to(delta.dtype), out=piece)
            if moves is not None and not on_host:
                piece.mul_(moves.view(-1, 1, 1, 1))
            piece.mul_(by).add_(delta[index])
        else:
            piece.copy_(delta[index])
        torch.clamp(piece, -bound, bound, out=piece)
        _clear_padding(piece, frames, index)
        # Rounding x + delta must leave neither the range nor, where x itself is beyond it, that pixel's own value.
        torch.clamp(piece.add_(x), x.clamp_max(floor), x.clamp_min(ceiling), out=piece).sub_(x)
    return out


def _pieces(delta: Tensor, *numbers: Sequence[float]) -> Iterator[tuple[tuple, Any]]:
    """Index of a piece and its four constants.

    Rows of one channel, whose constants are numbers, on a CPU; rows of all channels where those lie between each other;
    the whole on a device, where launches cost more.
    """
    n, channels, height, width = delta.shape
    if delta.device.type != "cpu":
        yield (slice(None),), _constants(delta, numbers)
        return
    planar = delta.is_contiguous() or channels == 1
    rows = min(max(1, PIECE // max(width if planar else width * channels, 1)), height)
    wide: list[Tensor] = []
    if not planar:
        # As large as a piece and laid out alike: numbers repeated every few elements are slow to read.
        like = delta[0, :, :rows]
        wide = [torch.empty_like(like).copy_(row) for row in _constants(delta, numbers)]
    for i in range(n):
        for c in range(channels) if planar else (slice(None),):
            for top in range(0, height, rows):
                values = [row[c] for row in numbers] if planar else [row[:, : height - top] for row in wide]
                yield (i, c, slice(top, top + rows)), values


def _constants(delta: Tensor, numbers: Sequence[Sequence[float]]) -> list[Tensor]:
    """``[C, 1, 1]`` each, copied without waiting."""
    table = torch.tensor(numbers, dtype=delta.dtype, device="cpu")
    if delta.device.type == "cuda":
        table = table.pin_memory()
    return list(table.to(delta.device, non_blocking=True)[:, :, None, None])


def _clear_padding(piece: Tensor, frames: Sequence[Sequence[int]] | None, index: tuple) -> None:
    if frames is None:
        return
    if len(index) == 1:
        for part, (h, w) in zip(piece, frames, strict=True):
            part[:, h:] = 0
            part[:, :h, w:] = 0
        return
    h, w = frames[index[0]]
    h = max(h - index[2].start, 0)
    piece[..., h:, :] = 0
    piece[..., :h, w:] = 0
