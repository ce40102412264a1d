"""Philox4x32-10 against the published vectors, and the uniforms and normals made of its words."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ikd_fast.kernels.reference import philox as ph
from ikd_fast.kernels.reference.philox import (
    Stream,
    draw,
    normal,
    philox4x32,
    philox4x32_blocks,
    stable_id,
    uniform,
)

# Random123 1.14, tests/kat_vectors, lines "philox4x32 10": counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
KEY = {"seed": 3, "id": 0xDEADBEEFCAFEBABE, "epoch": 5}


def words(text: str) -> tuple[int, ...]:
    return tuple(int(w, 16) for w in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    assert philox4x32(words(counter), words(key)) == words(expected)
    c0, c1, c2, c3 = words(counter)
    k0, k1 = words(key)
    # the stream is xor-ed into the third counter word, so take it out again
    args = {"id": c1 | (c2 ^ Stream.NOISE) << 32, "stream": Stream.NOISE, "epoch": c3, "seed": k0 | k1 << 32}
    assert tuple(philox4x32_blocks(torch.tensor([c0]), **args)[0].tolist()) == words(expected)


@given(
    block=st.integers(0, 2**32 - 1),
    id=st.integers(-(2**63), 2**64 - 1),
    stream=st.sampled_from(list(Stream)),
    epoch=st.integers(0, 2**32 - 1),
    seed=st.integers(0, 2**64 - 1),
)
@settings(deadline=None, max_examples=150)
def test_vectorised_equals_integers(block: int, id: int, stream: Stream, epoch: int, seed: int) -> None:
    blocks = [block, 0, 2**32 - 1]
    got = philox4x32_blocks(torch.tensor(blocks), id=id, stream=stream, epoch=epoch, seed=seed)
    low, high = (id % 2**64) & 0xFFFFFFFF, (id % 2**64) >> 32
    key = (seed & 0xFFFFFFFF, seed >> 32)
    assert got.tolist() == [list(philox4x32((b, low, high ^ stream, epoch), key)) for b in blocks]


def test_draw_is_the_top_24_bits() -> None:
    w = philox4x32((9, 7, 1 ^ Stream.CROP, 2), (11, 0))
    assert draw(11, 7 | 1 << 32, 2, Stream.CROP, 9) == tuple((x >> 8) / 2**24 for x in w)


@pytest.mark.parametrize("maker", [uniform, normal])
def test_offset_shape_and_chunks_do_not_change_a_number(maker, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = maker(1003, stream=Stream.MASK, **KEY)
    assert torch.equal(maker(100, stream=Stream.MASK, offset=63, **KEY), whole[63:163])
    assert torch.equal(maker((17, 59), stream=Stream.MASK, **KEY).flatten(), whole)
    monkeypatch.setattr(ph, "chunk_blocks", lambda device: 60)
    # not bit for bit: vectorised log and cosine treat the last elements of a chunk by another routine
    torch.testing.assert_close(maker(1003, stream=Stream.MASK, **KEY), whole, rtol=0, atol=1e-6)
    assert maker(0, stream=Stream.MASK, **KEY).shape == (0,)


def test_uniform_and_normal_by_hand() -> None:
    """Words of two blocks through the formulas in double precision."""
    u, z = [], []
    for block in (0, 1):
        w = philox4x32((block, KEY["id"] & 0xFFFFFFFF, (KEY["id"] >> 32) ^ Stream.NOISE, 5), (3, 0))
        u += [(x >> 8) / 2**24 for x in w]
        for a, b in ((w[0], w[1]), (w[2], w[3])):
            r, angle = math.sqrt(-2 * math.log(((a >> 8) + 1) / 2**24)), 2 * math.pi * (b >> 8) / 2**24
            z += [r * math.cos(angle), r * math.sin(angle)]
    assert uniform(8, stream=Stream.NOISE, **KEY).tolist() == u
    # float32: one rounding of the angle (4e-7) times r < 5.8
    torch.testing.assert_close(normal(8, stream=Stream.NOISE, **KEY), torch.tensor(z), rtol=0, atol=3e-6)


def test_distributions() -> None:
    n = 200_000
    u = uniform(n, stream=Stream.MASK, **KEY).double()
    z = normal(n, stream=Stream.NOISE, **KEY).double()
    # four standard errors: 1/sqrt(12 n), 1/sqrt(n), sqrt(2/n)
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * n)
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    pairs = z.view(-1, 2)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 4 / math.sqrt(n / 2)
    assert float(u.min()) >= 0
    assert float(u.max()) < 1


def test_every_part_of_the_key_matters() -> None:
    def first(stream: Stream = Stream.NOISE, **change: int) -> list[float]:
        return normal(4, stream=stream, **{**KEY, **change}).tolist()

    rows = [first(), first(seed=4), first(seed=3 + 2**32), first(id=1), first(id=1 + 2**32), first(epoch=6)]
    rows += [first(stream=s) for s in Stream if s != Stream.NOISE]
    assert len({tuple(r) for r in rows}) == len(rows)


def test_stable_id() -> None:
    assert stable_id(12) == 12
    assert stable_id(-1) == 2**64 - 1
    assert stable_id(2**64 + 5) == 5
    # by hand: a tag and an 8-byte length before each part
    part = b"s" + (4).to_bytes(8, "little") + b"coco" + b"i" + (2).to_bytes(8, "little") + b"42"
    expected = int.from_bytes(hashlib.blake2b(part, digest_size=8).digest(), "little")
    assert stable_id("coco", 42) == expected
    keys = [stable_id(*p) for p in (("a", "bc"), ("ab", "c"), ("abc",), ("1",), (1, 1), ("1", 1), ("11",))]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw(-1, 0, 0, Stream.CROP), r"seed must be in 0\.\.2\*\*64-1, got -1"),
        (lambda: draw(0, 0, 2**32, Stream.CROP), r"epoch must be in .*got 4294967296"),
        (lambda: draw(0.5, 0, 0, Stream.CROP), r"seed must be an integer, got 0\.5"),
        (lambda: draw(0, 0, 0, Stream.CROP, -1), r"block index .*got -1"),
        (lambda: stable_id(), "at least one"),
        (lambda: stable_id(1.5), r"image id must be an integer, got 1\.5"),
        (lambda: uniform(4, stream=1, offset=-1, **KEY), "offset must be >= 0, got -1"),
        (lambda: uniform(4, stream=1, offset=2**34, **KEY), r"2\*\*34 words"),
        (lambda: uniform(4, stream=1, dtype=torch.int32, **KEY), r"floating type, got torch\.int32"),
        (lambda: philox4x32_blocks(torch.zeros(2), 0, 1, 0, 0), r"int64 \[n\], got torch\.float32"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
