"""Means over channels and over positions of a pyramid: one launch forward, two where positions are asked for; one backward.

A program holds a block of positions of one image and goes through its channels once: sums over channels end in it, sums
over its positions are left for a second launch to add, so that no float is added atomically and a repeat gives the
same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_backward import attention_stats_backward
from .attention_forward import attention_stats_finish, attention_stats_forward
from .attention_power import GENERAL, MAGNITUDE, SQUARE
from .fgd_tiles import CHANNELS_LAST, CONTIGUOUS, STRIDED
from .launch import check_index_space, empty, empty_like, launch
from .levels import fixed
from .pyramid import strides_table

OP = "attention_stats"
# Positions of a program.
BLOCK_P = 128
# Channels and blocks that a program of the finishing launch adds at once.
PART_C, BLOCK_N = 8, 32


@dataclass(frozen=True)
class Tile:
    """Channels of a program's tile, and how many tiles a reading keeps in flight."""

    channels: int
    stages: int


# Positions innermost: accumulators lie across the tile, [channels, positions, 2]. Channels innermost: only [positions,
# 2], so the tile reaches further along the run of memory, 128 bytes; backward 64 channels would take 170 registers.
ROWS, LAST, LAST_WIDE, ANY = Tile(16, 3), Tile(64, 1), Tile(32, 1), Tile(16, 1)
WARPS = 8


def _layout(maps: Sequence[Tensor]) -> int:
    if all(x.is_contiguous() for x in maps):
        return int(CONTIGUOUS.value)
    if all(x.is_contiguous(memory_format=torch.channels_last) for x in maps):
        return int(CHANNELS_LAST.value)
    return int(STRIDED.value)


def _options(
    maps: Sequence[Tensor], layout: int, last: Tile, p: float, positive: bool
) -> dict[str, int | bool]:
    tile = {CONTIGUOUS.value: ROWS, CHANNELS_LAST.value: last}.get(layout, ANY)
    power = {1.0: MAGNITUDE, 2.0: SQUARE}.get(p, GENERAL).value
    return dict(
        LEVELS=len(maps), POWER=power, POSITIVE=positive, BLOCK_C=tile.channels, BLOCK_P=BLOCK_P, STAGES=tile.stages,
        num_warps=WARPS,
    )  # fmt: skip


def _sizes(maps: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """C, H and W of the levels as kernels take them."""
    for level, x in enumerate(maps):
        check_index_space(
            OP,
            f"level {level}",
            x.shape[1] * x.shape[2] * x.shape[3],
            BLOCK_P * max(x.shape[1], LAST.channels),
        )
    return tuple(fixed([x.shape[i] for x in maps]) for i in (1, 2, 3))


def _blocks(maps: Sequence[Tensor]) -> list[int]:
    return [-(-x.shape[2] * x.shape[3] // BLOCK_P) for x in maps]


def forward(
    maps: Sequence[Tensor], p: float, positive: bool, spatial: bool, channel: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float32 rows; see the reference."""
    device, n = maps[0].device, maps[0].shape[0]
    sizes, blocks = _sizes(maps), _blocks(maps)
    map_size = n * sum(x.shape[2] * x.shape[3] for x in maps) if spatial else 0
    vector_size = n * sum(x.shape[1] for x in maps) if channel else 0
    rows = n * sum(b * x.shape[1] for b, x in zip(blocks, maps, strict=True)) if channel else 0
    over_channels = [empty(map_size, torch.float32, device) for _ in range(2)]
    over_positions = [empty(vector_size, torch.float32, device) for _ in range(2)]
    partial = empty(2 * rows, torch.float32, device)
    layout = _layout(maps)
    strides = strides_table(maps) if layout == STRIDED.value else partial
    last = LAST if maps[0].element_size() == 2 else LAST_WIDE
    launch(
        attention_stats_forward, n * sum(blocks), device, tuple(maps), strides, *over_channels, partial, *sizes, n,
        p, LAYOUT=layout, SPATIAL=spatial, CHANNEL=channel, **_options(maps, layout, last, p, positive),
    )  # fmt: skip
    if channel:
        launch(
            attention_stats_finish, n * sum(-(-x.shape[1] // PART_C) for x in maps), device, partial, *over_positions,
            *sizes, n, LEVELS=len(maps), BLOCK_P=BLOCK_P, BLOCK_N=BLOCK_N, PART_C=PART_C, num_warps=4,
        )  # fmt: skip
    return over_channels[0], over_channels[1], over_positions[0], over_positions[1]


def backward(
    grad_spatial: Tensor | None,
    grad_spatial_mean: Tensor | None,
    grad_channel: Tensor | None,
    grad_channel_mean: Tensor | None,
    maps: Sequence[Tensor],
    p: float,
    positive: bool,
) -> list[Tensor]:
    """The gradient of every map, in its dtype and layout."""
    device = maps[0].device
    out = [empty_like(x) for x in maps]
    grads = (grad_spatial, grad_spatial_mean, grad_channel, grad_channel_mean)
    has = sum(1 << i for i, g in enumerate(grads) if g is not None)
    given = [g.contiguous() for g in grads if g is not None]
    if not given:
        return [x.zero_() for x in out]
    pointers = [given[0] if g is None else g.contiguous() for g in grads]
    layouts = _layout(maps), _layout(out)
    strides = strides_table(maps, out) if STRIDED.value in layouts else pointers[0]
    launch(
        attention_stats_backward, maps[0].shape[0] * sum(_blocks(maps)), device, tuple(maps), tuple(out), strides,
        *pointers, *_sizes(maps), maps[0].shape[0], p, X_LAYOUT=layouts[0], G_LAYOUT=layouts[1], HAS=has,
        **_options(maps, layouts[1], LAST_WIDE, p, positive),
    )  # fmt: skip
    return out
