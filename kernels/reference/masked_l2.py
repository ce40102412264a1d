"""MGD's random mask, a function of (seed, image id, epoch, level), and the pyramid times it.

The term's error, against the teacher's maps, is ``pyramid_l2``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .philox import M0, M1, W0, W1, Stream, _key_words
from .precision import full

LEVELS = 1 << 24
_LOW = 0xFFFFFFFF


def mask_stream(level: int) -> int:
    """The Philox stream of a level's mask: ``Stream.MASK + 256 * level``."""
    return int(Stream.MASK) + 256 * level


def keep_bound(ratio: float) -> int:
    """The largest k for which ``u = k 2^-24`` is kept: ``u <= 1 - ratio``, compared in float32."""
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"keyed_mask: ratio, the fraction set to zero, must be in 0..1, got {ratio}")
    return int(torch.tensor(1.0 - ratio, dtype=torch.float32, device="cpu").item() * 2**24)


def _words(c0: Tensor, c1: Tensor, c2: Tensor, epoch: int, k0: int, k1: int) -> tuple[Tensor, ...]:
    """The ten rounds where every block has an image and a stream of its own; high bits are left unmasked.

    ``philox._rounds`` is faster on one long stream; a pyramid is many short ones, where each call costs more
    than its numbers.
    """
    c3 = torch.full_like(c0, epoch)
    for _ in range(10):
        p0, p1 = c0.mul_(M0), c2 * M1
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_LOW)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_LOW)
        c1, c3 = p1, p0
        k0, k1 = (k0 + W0) & _LOW, (k1 + W1) & _LOW
    return c0, c1, c2, c3


def keep_masks(
    sizes: Sequence[tuple[int, int]],
    ids: Sequence[int],
    levels: Sequence[int],
    seed: int,
    epoch: int,
    ratio: float,
    device: torch.device | str | None,
) -> list[Tensor]:
    """bool ``[N, 1, H, W]`` for every level: true where the map is kept. All draws are made at once."""
    bound, n = keep_bound(ratio), len(ids)
    blocks, id_words = [], []
    k0 = k1 = 0
    for (height, width), level in zip(sizes, levels, strict=True):
        keys = [_key_words(seed, i, epoch, mask_stream(level)) for i in ids]
        k0, k1 = keys[0][3:] if keys else (0, 0)
        count = height * ((width + 3) // 4)
        blocks.append(torch.arange(count, device=device).expand(n, count).reshape(-1))
        pair = torch.tensor([key[:2] for key in keys], dtype=torch.int64, device="cpu").reshape(n, 2, 1)
        id_words.append(pair.to(device, non_blocking=True).expand(n, 2, count).transpose(0, 1).reshape(2, -1))
    low, high = torch.cat(id_words, 1)
    words = _words(torch.cat(blocks), low, high, epoch, k0, k1)
    # word >> 8 <= bound, with the bits above 32 cleared and those below 8 of no account
    keep = torch.stack([w.bitwise_and_(_LOW) < (bound + 1) << 8 for w in words], 1)
    out, start = [], 0
    for height, width in sizes:
        width4 = (width + 3) // 4 * 4
        stop = start + n * height * width4 // 4
        out.append(keep[start:stop].reshape(n, 1, height, width4)[..., :width])
        start = stop
    return out


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
    return keep_masks([(height, width)], image_ids, [level], seed, epoch, ratio, device)[0].to(dtype)


def mask(
    maps: Sequence[Tensor],
    dtype: torch.dtype,
    ids: Sequence[int],
    levels: Sequence[int],
    seed: int,
    epoch: int,
    ratio: float,
) -> list[Tensor]:
    """Every map times its keyed mask, computed in float32 (float64 stays) and stored as ``dtype``."""
    sizes = [(x.shape[2], x.shape[3]) for x in maps]
    keep = keep_masks(sizes, ids, levels, seed, epoch, ratio, maps[0].device)
    return [_product(x, m, dtype) for x, m in zip(maps, keep, strict=True)]


def _product(x: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    y = full(x)
    reused = y is not x and y.dtype == dtype
    return torch.mul(y, keep, out=y if reused else torch.empty_like(x, dtype=dtype))
