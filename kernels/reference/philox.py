"""Philox4x32-10: randomness as a function of (seed, image id, epoch, stream, index), not as a state.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011. One block turns a 128-bit
    counter and a 64-bit key into four 32-bit words, so any word can be computed alone, on any device, in any
    order.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10
_INV24 = 2.0**-24
# Blocks at a time. On a CPU: near the cache, yet more than torch's grain of 2^15 where threads may share the work
# (3x800x1336 normals: 20 ms on two idle threads at 2^16; on one 37 ms, and 30 ms at 2^15). Elsewhere launches cost more.
_CHUNK_CPU, _CHUNK_CPU_ALONE, _CHUNK_DEVICE = 1 << 16, 1 << 15, 1 << 21


def chunk_blocks(device: torch.device) -> int:
    """How many blocks to make at a time."""
    if device.type != "cpu":
        return _CHUNK_DEVICE
    return _CHUNK_CPU if torch.get_num_threads() > 1 else _CHUNK_CPU_ALONE


class Stream(IntEnum):
    """What a draw is for: draws of different streams never share a word."""

    BRANCH = 1
    CROP = 2
    FLIP = 3
    NOISE = 4
    DIVERSITY = 5
    START = 6
    MASK = 7
    SAMPLER = 8
    LOADER = 9
    ORDER = 10
    GENERATORS = 11
    VICTIM = 12
    KORNIA = 13
    FRACTION = 14
    SLOT = 15


def stable_id(*parts: str | int) -> int:
    """64-bit key of an image, the same on every machine and in every process.

    One integer is used as it is (modulo 2**64); anything else is hashed (BLAKE2b, 8 bytes) with types and
    lengths kept apart, so ``("a", "bc")``, ``("ab", "c")``, ``1`` and ``"1"`` all differ. Give the data set's
    name as well as the image id when data sets are concatenated.

    >>> stable_id(42)
    42
    >>> stable_id("coco", 42) != stable_id("voc", 42)
    True
    """
    if not parts:
        raise ValueError("stable_id expects at least one string or integer, got none")
    if len(parts) == 1 and not isinstance(parts[0], str):
        return _as_int(parts[0], "image id") % (1 << 64)
    h = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode() if isinstance(part, str) else str(_as_int(part, "image id")).encode()
        h.update((b"s" if isinstance(part, str) else b"i") + len(data).to_bytes(8, "little") + data)
    return int.from_bytes(h.digest(), "little")


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """One block on Python integers: 4 counter words and 2 key words in, 4 words of 32 bits out (10 rounds).

    >>> [f"{w:08x}" for w in philox4x32((0, 0, 0, 0), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = M0 * c0, M1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + W0) & _MASK, (k1 + W1) & _MASK
    return c0, c1, c2, c3


def _as_int(value: object, what: str) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{what} must be an integer, got {value!r} of type {type(value).__name__}") from None


def _key_words(seed: int, id: int, epoch: int, stream: int) -> tuple[int, int, int, int, int]:
    """(id low, id high ^ stream, epoch, key 0, key 1), each checked to fit."""
    seed, id, epoch = _as_int(seed, "seed"), _as_int(id, "image id"), _as_int(epoch, "epoch")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in 0..2**64-1, got {seed}")
    if not 0 <= epoch <= _MASK:
        raise ValueError(f"epoch must be in 0..2**32-1, got {epoch}")
    id %= 1 << 64
    return id & _MASK, (id >> 32) ^ int(stream), epoch, seed & _MASK, seed >> 32


def draw(seed: int, id: int, epoch: int, stream: int, index: int = 0) -> tuple[float, float, float, float]:
    """Four uniforms in [0, 1), multiples of 2**-24, from block ``index`` of a stream. Host only, for plans.

    >>> draw(0, 7, 0, Stream.CROP) == draw(0, 7, 0, Stream.CROP)
    True
    """
    id_lo, id_hi, epoch, k0, k1 = _key_words(seed, id, epoch, stream)
    index = _as_int(index, "index")
    if not 0 <= index <= _MASK:
        raise ValueError(f"block index must be in 0..2**32-1, got {index}")
    a, b, c, d = philox4x32((index, id_lo, id_hi, epoch), (k0, k1))
    return (a >> 8) * _INV24, (b >> 8) * _INV24, (c >> 8) * _INV24, (d >> 8) * _INV24


def _multiply(x: Tensor, factor: int, out: Tensor) -> None:
    """``out = x * factor`` modulo 2**64.

    On one CPU thread by NumPy, whose loop takes 0.4 of the time of torch's. On two it would leave the other waiting
    (3x800x1336 normals: 96 ms against 30).
    """
    alone = x.device.type == "cpu" and torch.get_num_threads() == 1
    if alone and type(x) is Tensor and not torch.compiler.is_compiling():
        np.multiply(x.numpy().view(np.uint64), np.uint64(factor), out=out.numpy().view(np.uint64))
    else:
        torch.mul(x, factor, out=out)


def _rounds(blocks: Tensor, key: tuple[int, int, int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ten rounds on int64 [n] block indices; words 1 and 3 keep unmasked high bits.

    int64 products wrap modulo 2**64, which leaves the low 64 bits right; an arithmetic shift is right after
    the mask.
    """
    id_lo, id_hi, epoch, k0, k1 = key
    # Round 1 by hand: three of the four counter words are the same for every block.
    p1 = M1 * id_hi
    c0_scalar = (p1 >> 32) ^ id_lo ^ k0
    p0 = blocks * M0
    c2 = (p0 >> 32).bitwise_xor_(epoch ^ k1).bitwise_and_(_MASK)
    k0, k1 = (k0 + W0) & _MASK, (k1 + W1) & _MASK
    # Round 2: c0 is still a scalar.
    q0 = M0 * c0_scalar
    q1 = c2 * M1
    c0 = (q1 >> 32).bitwise_xor_((p1 & _MASK) ^ k0).bitwise_and_(_MASK)
    c2 = p0.bitwise_xor_((q0 >> 32) ^ k1).bitwise_and_(_MASK)
    c1, c3 = q1, torch.full_like(q1, q0 & _MASK)
    t = torch.empty_like(c1)
    for _ in range(_ROUNDS - 2):
        k0, k1 = (k0 + W0) & _MASK, (k1 + W1) & _MASK
        _multiply(c2, M1, out=t)
        torch.bitwise_right_shift(t, 32, out=c2)
        c2.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)  # the next c0
        _multiply(c0, M0, out=c1)
        torch.bitwise_right_shift(c1, 32, out=c0)
        c0.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)  # the next c2
        c0, c1, c2, c3, t = c2, t, c0, c1, c3
    return c0, c1, c2, c3


def philox4x32_blocks(
    blocks: Tensor, id: int, stream: int, epoch: int, seed: int, device: torch.device | str | None = None
) -> Tensor:
    """Words of blocks of one (seed, id, epoch, stream): int64 ``[n]`` block indices to int64 ``[n, 4]`` words.

    Counter = (block, id low 32, id high 32 xor stream, epoch), key = (seed low 32, seed high 32). Values in
    0..2**32-1.
    """
    if blocks.dtype != torch.int64 or blocks.dim() != 1:
        raise TypeError(f"blocks must be int64 [n], got {blocks.dtype} {list(blocks.shape)}")
    key = _key_words(seed, id, epoch, stream)
    blocks = blocks.to(device if device is not None else blocks.device)
    words = _rounds(blocks.bitwise_and(_MASK), key)
    return torch.stack([w.bitwise_and(_MASK) for w in words], dim=1)


def _shape(n: int | Sequence[int]) -> tuple[int, ...]:
    return (n,) if isinstance(n, int) else tuple(n)


def _check_span(first: int, count: int, dtype: torch.dtype) -> None:
    if first < 0:
        raise ValueError(f"offset must be >= 0, got {first}")
    if first + count > 1 << 34:
        raise ValueError(f"one stream holds 2**34 words, got offset {first} + {count} elements")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating type, got {dtype}")


def _fill(
    n: int | Sequence[int],
    offset: int,
    device: torch.device | str | None,
    dtype: torch.dtype,
    key: tuple[int, int, int, int, int],
    columns: Callable[[Tensor, Sequence[Tensor]], None],
) -> Tensor:
    """Chunked evaluation: ``columns(out[n, 4], words)`` writes the four values of each block."""
    shape = _shape(n)
    count = math.prod(shape)
    _check_span(offset, count, dtype)
    device = torch.device("cpu" if device is None else device)
    first, last = offset // 4, (offset + count + 3) // 4
    n_blocks = last - first if count else 0
    out = torch.empty((n_blocks, 4), dtype=torch.float32, device=device)
    chunk = chunk_blocks(device)
    for start in range(0, n_blocks, chunk):
        stop = min(start + chunk, n_blocks)
        blocks = torch.arange(first + start, first + stop, dtype=torch.int64, device=device)
        columns(out[start:stop], _rounds(blocks, key))
    skip = offset - 4 * first
    return out.view(-1)[skip : skip + count].view(shape).to(dtype)


def _top24(word: Tensor) -> Tensor:
    return word.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).to(torch.float32)


def _uniform_columns(out: Tensor, words: Sequence[Tensor]) -> None:
    for j, w in enumerate(words):
        torch.mul(_top24(w), _INV24, out=out[:, j])


def _normal_columns(out: Tensor, words: Sequence[Tensor]) -> None:
    for j in (0, 2):
        r = _top24(words[j]).add_(1.0).mul_(_INV24).log_().mul_(-2.0).sqrt_()
        angle = _top24(words[j + 1]).mul_(2.0 * math.pi * _INV24)
        torch.mul(r, angle.cos(), out=out[:, j])
        torch.mul(r, angle.sin_(), out=out[:, j + 1])


def uniform(
    n: int | Sequence[int],
    *,
    seed: int,
    id: int,
    epoch: int,
    stream: int,
    offset: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """U[0, 1) of a stream, multiples of 2**-24.

    Element ``i`` comes from word ``w = offset + i``, which is word ``w % 4`` of block ``w // 4``.

    Computed in float32, cast to ``dtype`` at the end (half types can round up to 1).
    """
    return _fill(n, offset, device, dtype, _key_words(seed, id, epoch, stream), _uniform_columns)


def normal(
    n: int | Sequence[int],
    *,
    seed: int,
    id: int,
    epoch: int,
    stream: int,
    offset: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals of a stream by Box-Muller on the word pairs (0, 1) and (2, 3) of each block.

    u1 = ((w >> 8) + 1) 2**-24 in (0, 1], u2 = (w' >> 8) 2**-24, r = sqrt(-2 ln u1): r cos(2 pi u2), r sin(2
    pi u2). The largest absolute value is 5.77. Computed in float32, cast to ``dtype`` at the end. Element
    ``i`` takes position ``offset + i``.
    """
    return _fill(n, offset, device, dtype, _key_words(seed, id, epoch, stream), _normal_columns)
