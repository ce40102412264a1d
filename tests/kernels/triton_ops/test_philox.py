"""Philox inside a kernel: words bit for bit, uniforms exactly, normals within 1e-5 of the reference's."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from ikd_fast.kernels.reference.philox import Stream, normal, philox4x32_blocks, uniform
from ikd_fast.kernels.triton_ops import philox as ph
from ikd_fast.kernels.triton_ops.launch import empty, launch

# (seed, image id, epoch): small, and every half of every number in use.
KEYS = [
    (0, 0, 0),
    (3, 7, 5),
    (2**64 - 1, 2**64 - 1, 2**32 - 1),
    (0x299F31D0A4093822, -0x0123456789ABCDEF, 77),
]
FIRST = [0, 2**31 - 64, 2**32 - 256]
BLOCKS = 256


@triton.jit
def kernel_words(p_key, p_out, first, BLOCKS: tl.constexpr):
    id_low, id_high, epoch, seed_low, seed_high = ph.load_key(p_key)
    o = tl.arange(0, BLOCKS)
    blocks = o.to(tl.uint32) + tl.load(first).to(tl.uint32)
    a, b, c, d = ph.words(blocks, id_low, id_high, epoch, seed_low, seed_high)
    tl.store(p_out + o * 4, a.to(tl.int64))
    tl.store(p_out + o * 4 + 1, b.to(tl.int64))
    tl.store(p_out + o * 4 + 2, c.to(tl.int64))
    tl.store(p_out + o * 4 + 3, d.to(tl.int64))


@triton.jit
def kernel_values(p_key, p_normal, p_uniform, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    id_low, id_high, epoch, seed_low, seed_high = ph.load_key(p_key)
    blocks = tl.arange(0, ROWS)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    b_n = ph.normal_groups(blocks, id_low, id_high, epoch, seed_low, seed_high, ROWS, GROUPS)
    o = tl.arange(0, ROWS)[:, None] * (4 * GROUPS) + tl.arange(0, 4 * GROUPS)[None, :]
    tl.store(p_normal + o, b_n)
    index = tl.arange(0, 4 * ROWS * GROUPS).to(tl.uint32)
    b_u = ph.uniform_of(ph.word_of(index, id_low, id_high, epoch, seed_low, seed_high))
    tl.store(p_uniform + index.to(tl.int32), b_u)


@triton.jit
def kernel_sincos(p_k, p_sin, p_cos, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    sine, cosine = ph.sincos_turn(tl.load(p_k + o).to(tl.uint32))
    tl.store(p_sin + o, sine)
    tl.store(p_cos + o, cosine)


def keys(seed: int, id: int, epoch: int, device) -> torch.Tensor:
    return ph.key_table([id], seed=seed, epoch=epoch, streams=(Stream.NOISE,), device=device)


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize(("seed", "id", "epoch"), KEYS)
def test_words_bit_for_bit(poison, device, seed, id, epoch, first) -> None:
    out = empty((BLOCKS, 4), torch.int64, device)
    start = torch.tensor([first], device=device)
    launch(kernel_words, 1, device, keys(seed, id, epoch, device), out, start, BLOCKS=BLOCKS, num_warps=4)
    blocks = torch.arange(first, first + BLOCKS)
    assert torch.equal(out.cpu(), philox4x32_blocks(blocks, id, Stream.NOISE, epoch, seed))


@pytest.mark.parametrize(("seed", "id", "epoch"), KEYS)
def test_normals_and_uniforms(poison, device, seed, id, epoch) -> None:
    rows, groups = 16, 32
    count = 4 * rows * groups
    normals, uniforms = (empty(count, torch.float32, device) for _ in range(2))
    launch(
        kernel_values, 1, device, keys(seed, id, epoch, device), normals, uniforms, ROWS=rows, GROUPS=groups, num_warps=4
    )  # fmt: skip
    key = {"seed": seed, "id": id, "epoch": epoch, "stream": Stream.NOISE}
    assert torch.equal(uniforms.cpu(), uniform(count, **key))
    # A logarithm and a sine of two float32 libraries, times a radius up to 5.8.
    assert (normals.cpu().double() - normal(count, **key).double()).abs().max() < 1e-5


def test_sincos_of_every_eighth_of_a_turn(poison, device) -> None:
    edges = torch.arange(0, 2**24, 2**21)
    g = torch.Generator().manual_seed(0)
    k = torch.cat([edges, edges + 1, (edges - 1) % 2**24, torch.randint(0, 2**24, (1000,), generator=g)])
    k = torch.cat([k, torch.full((1024 - len(k),), 2**24 - 1)])[:1024].to(device)
    sine, cosine = (empty(1024, torch.float32, device) for _ in range(2))
    launch(kernel_sincos, 1, device, k, sine, cosine, BLOCK=1024, num_warps=4)
    angle = k.cpu().double() * (2 * torch.pi / 2**24)
    # The polynomials' 2e-8, and float32 roundings of values up to 1.
    assert (sine.cpu().double() - angle.sin()).abs().max() < 1.5e-7
    assert (cosine.cpu().double() - angle.cos()).abs().max() < 1.5e-7


def test_key_table_is_one_row_for_each_stream_and_image(device) -> None:
    rows = ph.key_table([5, -1], seed=2**33 + 1, epoch=9, streams=(Stream.NOISE, Stream.CROP), device=device)
    low, high = 0xFFFFFFFF, 0xFFFFFFFF
    expected = [
        [5, 0 ^ Stream.NOISE, 9, 1, 2],
        [low, high ^ Stream.NOISE, 9, 1, 2],
        [5, 0 ^ Stream.CROP, 9, 1, 2],
        [low, high ^ Stream.CROP, 9, 1, 2],
    ]
    assert rows.tolist() == expected
