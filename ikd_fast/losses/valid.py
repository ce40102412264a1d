"""Which positions of a map lie inside its image, where batches are padded at the bottom and right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import DistillContext


def valid_masks(ctx: DistillContext, maps: Sequence[Tensor], levels: Sequence[int]) -> list[Tensor]:
    """bool ``[N, H, W]`` for each map: ``ctx.valid`` where the caller gave masks, else from the image sizes.

    A cell is valid if it covers at least one pixel of the image: row y where ``y < ceil(h H / input height)``,
    columns alike. ``levels`` are the maps' indices in the pyramid. Sizes go to the device by one asynchronous
    copy.

    >>> ctx = DistillContext([], None, [(30, 64)], (64, 64), [0])
    >>> valid_masks(ctx, [torch.zeros(1, 8, 4, 4)], [0])[0][0, :, 0].tolist()
    [True, True, False, False]
    """
    if ctx.valid is not None:
        return [ctx.valid[level] for level in levels]
    height, width = ctx.input_size
    rows = [
        [(-(-h * x.shape[2] // height), -(-w * x.shape[3] // width)) for h, w in ctx.image_sizes]
        for x in maps
    ]
    device = maps[0].device
    limits = torch.tensor(rows, device="cpu").to(device, non_blocking=True)
    out = []
    for x, limit in zip(maps, limits, strict=True):
        down = torch.arange(x.shape[2], device=device)[None, :, None] < limit[:, 0, None, None]
        across = torch.arange(x.shape[3], device=device)[None, None, :] < limit[:, 1, None, None]
        out.append(down & across)
    return out
