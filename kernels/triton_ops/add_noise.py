"""Keyed noise added to stacks of images or to images of any sizes: one launch each way.

A program makes one tile of rows and columns of one image, channel by channel; four neighbours share a Philox block,
which is computed once. Columns count in the noise's order: for mirrored images that is from the right, and their
loads and stores are narrow, as are those of noise on interleaved channels and of images with gaps between rows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.philox import Stream
from .launch import INT32_MAX, check_index_space, empty_like, launch, table
from .philox import key_rows, load_key, normal_groups
from .rows import copy_tile, float_bits, load_float, load_int, load_pointer, offset_at, round_half_even

OP = "add_noise"
ROWS, COLUMNS, WARPS = 16, 64, 4
BYTE_ROWS = 32  # a thread has 16 bytes to move all the same
TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.uint8: tl.uint8,
}


@triton.jit
def _result(b, source, noise, inside, low, high, BACKWARD: tl.constexpr):
    """The clamped sum, or the gradient ``source`` where the sum is in range; outside the valid part as it came."""
    total = b.to(tl.float32) + noise
    if BACKWARD:
        passes = (total >= low) & (total <= high) | (inside == 0)
        out = tl.where(passes, source.to(tl.float32), 0.0)
    else:
        clamped = tl.where(total < low, low, tl.where(total > high, high, total))  # NaN stays
        out = tl.where(inside, clamped, b.to(tl.float32))
    return out.to(b.dtype)


@triton.jit(do_not_specialize=["n_images", "channels"])
def keyed_noise(
    p_table,  # [N, 24] and [C, 3]
    n_images,
    channels,
    DTYPE: tl.constexpr,
    BACKWARD: tl.constexpr,
    DENSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    OFFSET: tl.constexpr,
    REVERSE: tl.constexpr,
    ROUND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_tile = tl.program_id(0)
    p_row = p_table + tl.program_id(1) * 24
    p_in = load_pointer(p_row, DTYPE, UNIT > 1)
    p_source = load_pointer(p_row + 1, DTYPE, UNIT > 1)
    p_out = load_pointer(p_row + 2, DTYPE, UNIT > 1)
    height, width = load_int(p_row + 12), load_int(p_row + 13) // UNIT * UNIT
    h, w, flip = load_int(p_row + 14), load_int(p_row + 15), load_int(p_row + 16)
    sigma = load_float(p_row + 17)
    tiles_x = tl.maximum(tl.cdiv(width, COLUMNS), 1)
    top, left = (i_tile // tiles_x) * ROWS, (i_tile % tiles_x) * COLUMNS
    if top >= height:
        return
    if (sigma > 0) & (top < h) & (left < w):
        id_low, id_high, epoch, seed_low, seed_high = load_key(p_row + 18)
        o = tl.arange(0, ROWS * COLUMNS)
        y, x = (top + tl.arange(0, ROWS))[:, None], (left + tl.arange(0, COLUMNS))[None, :]
        y_o, x_o = top + o // COLUMNS, left + o % COLUMNS
        x_moved = tl.where((flip != 0) & (x_o < w), w - 1 - x_o, x_o)
        groups = (left // 4 + tl.arange(0, COLUMNS // 4))[None, :]
        for c in range(channels):
            c_noise = channels - 1 - c if REVERSE else c
            blocks = (c_noise * h + y) * ((w + 3) // 4) + groups
            noise = sigma * normal_groups(
                blocks, id_low, id_high, epoch, seed_low, seed_high, ROWS, COLUMNS // 4
            )
            if ROUND:
                noise = round_half_even(noise)
            p_channel = p_table + n_images * 24 + c * 3
            noise = noise * load_float(p_channel)
            low, high = load_float(p_channel + 1), load_float(p_channel + 2)
            if DENSE and not CHANNELS_LAST and flip == 0:
                m = (y < height) & (x < width)
                o_plane = (c * height + y) * width + x
                b = tl.load(p_in + o_plane, mask=m)  # stream
                b_source = b
                if BACKWARD:
                    b_source = tl.load(p_source + o_plane, mask=m)  # stream
                b_out = _result(b, b_source, noise, (y < h) & (x < w), low, high, BACKWARD)
                tl.store(p_out + o_plane, b_out, mask=m)  # stream
            else:
                m_o = (y_o < height) & (x_o < width)
                b_o = tl.load(p_in + offset_at(c, y_o, x_moved, p_row + 3, OFFSET), mask=m_o)
                b_source_o = b_o
                if BACKWARD:
                    b_source_o = tl.load(p_source + offset_at(c, y_o, x_moved, p_row + 6, OFFSET), mask=m_o)
                noise_o = tl.reshape(noise, [ROWS * COLUMNS])
                b_out_o = _result(b_o, b_source_o, noise_o, (y_o < h) & (x_o < w), low, high, BACKWARD)
                tl.store(p_out + offset_at(c, y_o, x_moved, p_row + 9, OFFSET), b_out_o, mask=m_o)
    else:
        copy_tile(
            p_source if BACKWARD else p_in, p_out, p_row, top, left, height, width, channels, DENSE, CHANNELS_LAST,
            OFFSET, 6 if BACKWARD else 3, ROWS, COLUMNS,
        )  # fmt: skip


def _layout(stacks: Sequence[Tensor]) -> tuple[bool, bool]:
    """(every image dense and of one layout, which is channels_last)."""
    if all(image.is_contiguous() for stack in stacks for image in stack[:1]):
        return True, False
    last = all(stack[:1].is_contiguous(memory_format=torch.channels_last) for stack in stacks)
    return last, last


def _run(
    images: Sequence[Tensor],
    grads: Sequence[Tensor],
    sigma: Sequence[float],
    ids: Sequence[int],
    flip: Sequence[bool],
    sizes: Sequence[tuple[int, int]],
    seed: int,
    epoch: int,
    constants: Sequence[Sequence[float]],
    reverse: bool,
    round_noise: bool,
) -> list[Tensor]:
    device, dtype = images[0].device, images[0].dtype
    for s, stack in enumerate(images):
        check_index_space(OP, f"images[{s}]", stack[:1].numel())
    out = [empty_like(stack) for stack in images]
    sources = grads or images
    keys = key_rows(ids, seed=seed, epoch=epoch, streams=(Stream.NOISE,))
    rows: list[tuple[int, ...]] = []
    unit, farthest = 16 // dtype.itemsize, 0
    for stacks in zip(images, sources, out, strict=True):
        n, _, height, width = stacks[0].shape
        inner = [x.stride()[1:] for x in stacks]
        for strides in inner:
            span = sum((n - 1) * k for n, k in zip(stacks[0].shape[1:], strides, strict=True))
            farthest = max(farthest, span)
        aligned = width % unit == 0 and all(x.stride(0) % unit == 0 or n == 1 for x in stacks)
        if not aligned or any(x.data_ptr() % 16 for x in stacks):
            unit = 1
        for j in range(n):
            i = len(rows)
            addresses = (x.data_ptr() + j * x.stride(0) * x.element_size() for x in stacks)
            rows.append(
                (
                    *(*addresses, *inner[0], *inner[1], *inner[2]),
                    *(height, width, *sizes[i], flip[i], float_bits(sigma[i]), *keys[i], 0),
                )
            )
    numbers = [value for row in rows for value in row]
    numbers += [float_bits(v) for channel in zip(*constants, strict=True) for v in channel]
    dense, last = _layout([*images, *sources, *out])
    tile_rows = BYTE_ROWS if dtype == torch.uint8 else ROWS
    tiles = max(
        (triton.cdiv(x.shape[2], tile_rows) * triton.cdiv(x.shape[3], COLUMNS) for x in images), default=0
    )
    launch(
        keyed_noise,
        (tiles, len(rows)),
        device,
        table(numbers, torch.int64, device),
        len(rows),
        images[0].shape[1],
        DTYPE=TYPES[dtype],
        BACKWARD=bool(grads),
        DENSE=dense,
        CHANNELS_LAST=last,
        UNIT=unit if dense else 1,
        OFFSET=tl.int32 if farthest <= INT32_MAX else tl.int64,
        REVERSE=reverse,
        ROUND=round_noise,
        ROWS=tile_rows,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )
    return out


def forward(
    images: Sequence[Tensor],
    sigma: Sequence[float],
    ids: Sequence[int],
    flip: Sequence[bool],
    sizes: Sequence[tuple[int, int]],
    seed: int,
    epoch: int,
    grey_level: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    reverse: bool,
    round_noise: bool,
    rng: str,
) -> list[Tensor]:
    """New stacks; see the reference. The noise is Philox's (``rng`` is checked before)."""
    constants = (grey_level, low, high)
    return _run(images, (), sigma, ids, flip, sizes, seed, epoch, constants, reverse, round_noise)


def backward(
    grads: Sequence[Tensor],
    images: Sequence[Tensor],
    sigma: Sequence[float],
    ids: Sequence[int],
    flip: Sequence[bool],
    sizes: Sequence[tuple[int, int]],
    seed: int,
    epoch: int,
    grey_level: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    reverse: bool,
    round_noise: bool,
    rng: str,
) -> list[Tensor]:
    """The gradients of ``images``; the noise is made again."""
    constants = (grey_level, low, high)
    return _run(images, grads, sigma, ids, flip, sizes, seed, epoch, constants, reverse, round_noise)
