"""Philox4x32-10 inside a kernel: the words of ``reference/philox.py`` bit for bit, its normals within 1e-5.

A key is a row of five numbers (image id low, image id high xor stream, epoch, seed low, seed high), so that one
table holds the keys of a batch whatever they are.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.philox import _key_words
from .launch import table

KEY_WORDS = 5
TWO_PI_24: tl.constexpr = tl.constexpr(6.283185307179586 / 2**24)
INV_24: tl.constexpr = tl.constexpr(2.0**-24)


def key_rows(ids: Sequence[int], *, seed: int, epoch: int, streams: Sequence[int]) -> list[tuple[int, ...]]:
    """One key row for every stream and image, streams outermost."""
    return [_key_words(seed, i, epoch, stream) for stream in streams for i in ids]


def key_table(
    ids: Sequence[int], *, seed: int, epoch: int, streams: Sequence[int], device: torch.device
) -> Tensor:
    """int64 ``[streams * N, 5]`` on the device."""
    rows = key_rows(ids, seed=seed, epoch=epoch, streams=streams)
    return table(rows, torch.int64, device).reshape(-1, KEY_WORDS)


@triton.jit
def load_key(p_row):
    """The five key words at ``p_row``, uint32."""
    id_low = tl.load(p_row).to(tl.uint32)
    id_high = tl.load(p_row + 1).to(tl.uint32)
    epoch = tl.load(p_row + 2).to(tl.uint32)
    seed_low = tl.load(p_row + 3).to(tl.uint32)
    seed_high = tl.load(p_row + 4).to(tl.uint32)
    return id_low, id_high, epoch, seed_low, seed_high


@triton.jit
def words(blocks, id_low, id_high, epoch, seed_low, seed_high):
    """The four uint32 words of each block index (ten rounds)."""
    c0 = blocks.to(tl.uint32)
    c1 = tl.zeros_like(c0) + id_low
    c2 = tl.zeros_like(c0) + id_high
    c3 = tl.zeros_like(c0) + epoch
    k0, k1 = seed_low, seed_high
    m0 = tl.full((), 0xD2511F53, tl.uint32)
    m1 = tl.full((), 0xCD9E8D57, tl.uint32)
    w0 = tl.full((), 0x9E3779B9, tl.uint32)
    w1 = tl.full((), 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, m0 + tl.zeros_like(c0))
        high1 = tl.umulhi(c2, m1 + tl.zeros_like(c2))
        low0 = c0 * m0
        low1 = c2 * m1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + w0
        k1 = k1 + w1
    return c0, c1, c2, c3


@triton.jit
def word_of(index, id_low, id_high, epoch, seed_low, seed_high):
    """Word number ``index`` of the stream: word ``index % 4`` of block ``index // 4``."""
    a, b, c, d = words(index // 4, id_low, id_high, epoch, seed_low, seed_high)
    lane = index % 4
    return tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))


@triton.jit
def uniform_of(word):
    """U[0, 1), a multiple of 2**-24."""
    return (word >> 8).to(tl.float32) * INV_24


@triton.jit
def sincos_turn(k):
    """sin and cos of ``2 pi k / 2**24``, uint32 ``k < 2**24``.

    The turn is reduced to an eighth exactly, in integers. The polynomials are Chebyshev interpolants there, errors
    6e-9 and 2e-8; the library functions carry a slow path that takes local memory.
    """
    quarter = ((k + 0x200000) >> 22).to(tl.int32)
    t = (k.to(tl.int32) - (quarter << 22)).to(tl.float32) * TWO_PI_24
    z = t * t
    s = 2.7173415684016946e-06 * z - 0.00019839201763025975
    s = (s * z + 0.008333328780948664) * z - 0.16666666631575122
    s = (s * z) * t + t
    c = 2.437978916242134e-05 * z - 0.0013886617544818772
    c = (c * z + 0.04166661667747791) * z - 0.49999999614702334
    c = c * z + 1.0
    odd = quarter % 2 == 1
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    sine = tl.where((quarter % 4) >= 2, -sine, sine)
    cosine = tl.where((quarter % 4 == 1) | (quarter % 4 == 2), -cosine, cosine)
    return sine, cosine


@triton.jit
def normal_pair(word, other):
    """Two standard normals of a word pair: Box-Muller with u1 = ((word >> 8) + 1) 2**-24 in (0, 1]."""
    u = ((word >> 8) + 1).to(tl.float32) * INV_24
    radius = tl.sqrt(-2.0 * tl.log(u))
    sine, cosine = sincos_turn(other >> 8)
    return radius * cosine, radius * sine


@triton.jit
def normal_groups(
    blocks, id_low, id_high, epoch, seed_low, seed_high, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """``[ROWS, 4 * GROUPS]`` normals of ``[ROWS, GROUPS]`` blocks, each block computed once for its four."""
    a, b, c, d = words(blocks, id_low, id_high, epoch, seed_low, seed_high)
    first, second = normal_pair(a, b)
    third, fourth = normal_pair(c, d)
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(pairs, [ROWS, 4 * GROUPS])
