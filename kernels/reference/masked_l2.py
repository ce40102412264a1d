"""MGD's random mask, a function of (seed, image id, epoch, level). Its error term is ``pyramid_l2``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .philox import Stream, uniform
from .precision import full


def mask_stream(level: int) -> int:
    """The Philox stream of a level's mask: ``Stream.MASK + 256 * level``."""
    return int(Stream.MASK) + 256 * level


def keyed_mask(
    image_ids: Sequence[int],
    height: int,
    width: int,
    *,
    ratio: float,
    level: int = 0,
    seed: int = 0,
    epoch: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Mask ``[N, 1, H, W]``: 0 where ``u > 1 - ratio`` and 1 elsewhere, u ~ U[0, 1).

    ``ratio`` is the fraction zeroed; ``u`` at (y, x) is word ``y * W4 + x`` of (seed, image id, epoch, stream
    ``mask_stream(level)``), W4 = W rounded up to a multiple of 4. So an image's mask depends on nothing else
    in its batch, and it changes with the epoch and the level.

    >>> keyed_mask([3, 4], 64, 64, ratio=0.65).shape
    torch.Size([2, 1, 64, 64])
    >>> bool((keyed_mask([3, 4], 8, 8, ratio=0.5)[1] == keyed_mask([4], 8, 8, ratio=0.5)[0]).all())
    True
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"keyed_mask: ratio, the fraction set to zero, must be in 0..1, got {ratio}")
    width4 = (width + 3) // 4 * 4
    keep = [
        uniform((height, width4), seed=seed, id=i, epoch=epoch, stream=mask_stream(level), device=device)[
            :, :width
        ]
        <= 1.0 - ratio
        for i in image_ids
    ]
    if not keep:
        return torch.empty((0, 1, height, width), device=device, dtype=dtype)
    return torch.stack(keep).unsqueeze(1).to(dtype)


def mask_maps(
    x: Tensor, image_ids: Sequence[int], *, ratio: float, level: int = 0, seed: int = 0, epoch: int = 0
) -> Tensor:
    """``x [N, C, H, W]`` times its keyed mask, one draw shared by all channels: float32 (float64 stays).

    >>> mask_maps(torch.ones(1, 8, 16, 16), [5], ratio=0.0).mean().item()
    1.0
    """
    if len(image_ids) != x.shape[0]:
        raise ValueError(
            f"mask_maps: expected one image id for each of the {x.shape[0]} images, got {len(image_ids)}"
        )
    x = full(x)
    h, w = x.shape[2:]
    return x * keyed_mask(
        image_ids, h, w, ratio=ratio, level=level, seed=seed, epoch=epoch, device=x.device, dtype=x.dtype
    )
