"""From ragged uint8 images to a network input: one launch for the batch.

A program makes one tile of rows and columns of one output image, all three channels, so that the bytes of an
interleaved pixel are fetched together. Columns count from the left of the window; without noise a mirrored image is read
backwards and written forwards. With noise it is read forwards, since four neighbours of the source share a Philox
block, and written backwards by narrow stores. Byte loads are narrow: a window begins at any byte.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.philox import Stream
from .launch import INT32_MAX, check_index_space, empty, launch, table
from .philox import key_rows, load_key, normal_groups
from .rows import float_bits, load_float, load_int, load_pointer, round_half_even

OP = "augment_batch"
# 8 pixels of three channels a thread: enough loads in flight, few registers. 64 columns divide 1344 and 800.
ROWS, COLUMNS, WARPS = 16, 64, 4
TABLE_WIDTH = 16


@triton.jit
def _scaled(b, mean, std, reciprocal):
    """(b - mean) / std: a product corrected by its remainder, within one unit in the last place of a division."""
    b = b - mean
    quotient = b * reciprocal
    return tl.fma(tl.fma(-quotient, std, b), reciprocal, quotient)


@triton.jit
def _of(channel, values):
    """The constant of each channel."""
    return tl.where(channel == 0, values[0], tl.where(channel == 1, values[1], values[2]))


@triton.jit
def _noisy(b, blocks, sigma, key, ROUND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    id_low, id_high, epoch, seed_low, seed_high = key
    noise = sigma * normal_groups(blocks, id_low, id_high, epoch, seed_low, seed_high, ROWS, COLUMNS // 4)
    if ROUND:
        noise = round_half_even(noise)
    return tl.minimum(tl.maximum(b + noise, 0.0), 255.0)


@triton.jit
def _interleaved(
    p_image,
    p_out,  # [height, width, 3]
    stride_c,
    stride_h,
    stride_w,
    top,
    left,
    h,
    w,
    height,
    width,
    flip,
    pad_value,
    mean,
    std,
    reciprocal,
    NORMALIZE: tl.constexpr,
    SWAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile without noise, channels innermost: three parts of the row of values, each stored 16 bytes at a time."""
    o = tl.arange(0, ROWS * COLUMNS)
    y_in = top + o // COLUMNS
    y = (top + tl.arange(0, ROWS))[:, None]
    for part in range(3):
        first = left * 3 + part * COLUMNS
        x_in, c_out = (first + o % COLUMNS) // 3, (first + o % COLUMNS) % 3
        source = tl.where(flip != 0, w - 1 - x_in, x_in)
        c_in = 2 - c_out if SWAP else c_out
        p_in = p_image + (y_in * stride_h + source * stride_w + c_in * stride_c)
        m_in = (y_in < h) & (x_in < w)
        b = tl.load(p_in, mask=m_in, other=0).to(tl.float32)
        if NORMALIZE:
            b = _scaled(b, _of(c_in, mean), _of(c_in, std), _of(c_in, reciprocal))
        b = tl.where(m_in, b, pad_value).to(p_out.dtype.element_ty)
        e = (first + tl.arange(0, COLUMNS))[None, :]
        b = tl.reshape(b, [ROWS, COLUMNS])
        tl.store(p_out + y * (width * 3) + e, b, mask=(y < height) & (e < width * 3))  # stream


@triton.jit(do_not_specialize=["height", "width", "tiles_x", "pad_value", "mean", "std", "reciprocal"])
def augment_batch_forward(
    p_table,  # [N, 16]
    p_out,  # [N, 3, height, width] or [N, height, width, 3]
    height,
    width,
    tiles_x,
    pad_value,
    mean,
    std,
    reciprocal,
    NORMALIZE: tl.constexpr,
    SWAP: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    ROUND: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_tile = tl.program_id(0)
    i_image = tl.program_id(1).to(tl.int64)
    p_row = p_table + i_image * 16
    p_image = load_pointer(p_row, tl.uint8, False)
    stride_c, stride_h = tl.load(p_row + 1).to(OFFSET), tl.load(p_row + 2).to(OFFSET)
    stride_w = tl.load(p_row + 3).to(OFFSET)
    h, w, flip = load_int(p_row + 4), load_int(p_row + 5), load_int(p_row + 6)
    sigma = load_float(p_row + 7)
    if ALIGNED:
        width = (width // 8) * 8
    p_out += i_image * 3 * height * width
    top, left = (i_tile // tiles_x) * ROWS, (i_tile % tiles_x) * COLUMNS
    noisy = HAS_NOISE and (sigma > 0) & (top < h) & (left < w)

    # Loads are one-dimensional, so that neighbouring threads take neighbouring pixels; stores are not, so that a
    # thread takes 16 bytes of a row. One shape for both would give a thread 16 strided bytes to load.
    o = tl.arange(0, ROWS * COLUMNS)
    y_in, x_in = top + o // COLUMNS, left + o % COLUMNS
    y, x = (top + tl.arange(0, ROWS))[:, None], (left + tl.arange(0, COLUMNS))[None, :]
    if CHANNELS_LAST and not noisy:
        _interleaved(
            p_image,
            p_out,
            stride_c,
            stride_h,
            stride_w,
            top,
            left,
            h,
            w,
            height,
            width,
            flip,
            pad_value,
            mean,
            std,
            reciprocal,
            NORMALIZE,
            SWAP,
            ROWS,
            COLUMNS,
        )
    else:
        source = tl.where((flip != 0) & (not noisy), w - 1 - x_in, x_in)
        o_in = y_in * stride_h + source * stride_w
        m_in = (y_in < h) & (x_in < w)
        # Where noise puts a pixel of a mirrored image.
        x_moved = tl.where((flip != 0) & (x_in < w), w - 1 - x_in, x_in)
        m_moved = (y_in < height) & (x_in < width)
        for c in tl.static_range(3):
            b = tl.load(p_image + (c * stride_c + o_in), mask=m_in, other=0)
            b = tl.reshape(b, [ROWS, COLUMNS]).to(tl.float32)
            if HAS_NOISE:  # noqa: SIM102 (one is known when compiling)
                if noisy:
                    blocks = (c * h + y) * ((w + 3) // 4) + (left // 4 + tl.arange(0, COLUMNS // 4))[None, :]
                    b = _noisy(b, blocks, sigma, load_key(p_row + 8), ROUND, ROWS, COLUMNS)
            if NORMALIZE:
                b = _scaled(b, mean[c], std[c], reciprocal[c])
            b = tl.where((y < h) & (x < w), b, pad_value).to(p_out.dtype.element_ty)
            c_out = 2 - c if SWAP else c
            if CHANNELS_LAST:
                p_moved = p_out + (y_in * width + x_moved) * 3 + c_out
                tl.store(p_moved, tl.reshape(b, [ROWS * COLUMNS]), mask=m_moved)
            elif noisy and flip != 0:
                p_moved = p_out + (c_out * height + y_in) * width + x_moved
                tl.store(p_moved, tl.reshape(b, [ROWS * COLUMNS]), mask=m_moved)
            else:
                p_straight = p_out + (c_out * height + y) * width + x
                tl.store(p_straight, b, mask=(y < height) & (x < width))  # stream


def forward(
    images: Sequence[Tensor],
    window: Tensor,
    flip: Tensor,
    sigma: Tensor,
    ids: Tensor,
    seed: int,
    epoch: int,
    hwc: bool,
    swap: bool,
    mean: Sequence[float],
    std: Sequence[float],
    height: int,
    width: int,
    pad_value: float,
    dtype: torch.dtype,
    channels_last: bool,
    round_noise: bool,
    rng: str,
) -> Tensor:
    """``[N, 3, height, width]``; see the reference. The noise is Philox's (``rng`` is checked before)."""
    device, n = images[0].device, len(images)
    check_index_space(OP, "the output", 3 * height * width)
    keys = key_rows(ids.tolist(), seed=seed, epoch=epoch, streams=(Stream.NOISE,))
    sigmas = sigma.tolist()
    rows, farthest = [], 0
    for i, (image, (x0, y0, x1, y1), mirror) in enumerate(
        zip(images, window.tolist(), flip.tolist(), strict=True)
    ):
        check_index_space(OP, f"images[{i}]", image.numel())
        stride_h, stride_w, stride_c = image.stride() if hwc else (*image.stride()[1:], image.stride(0))
        farthest = max(farthest, sum((n - 1) * s for n, s in zip(image.shape, image.stride(), strict=True)))
        address = image.data_ptr() + y0 * stride_h + x0 * stride_w
        rows.append(
            (
                *(address, stride_c, stride_h, stride_w, y1 - y0, x1 - x0, mirror, float_bits(sigmas[i])),
                *(*keys[i], 0, 0, 0),
            )
        )
    tiles_x = triton.cdiv(width, COLUMNS)
    out = empty((n, height, width, 3) if channels_last else (n, 3, height, width), dtype, device)
    # In the order of the input's channels, which the kernel counts.
    step = -1 if swap else 1
    mean_in, std_in = tuple(mean)[::step] or (0.0,) * 3, tuple(std)[::step] or (1.0,) * 3
    launch(
        augment_batch_forward,
        (tiles_x * triton.cdiv(height, ROWS), n),
        device,
        table(rows, torch.int64, device),
        out,
        height,
        width,
        tiles_x,
        float(pad_value),
        mean_in,
        std_in,
        tuple(1.0 / s for s in std_in),
        NORMALIZE=bool(mean),
        SWAP=swap,
        HAS_NOISE=any(s > 0 for s in sigmas),
        ROUND=round_noise,
        CHANNELS_LAST=channels_last,
        ALIGNED=width % 8 == 0,
        OFFSET=tl.int32 if farthest <= INT32_MAX else tl.int64,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )
    return out.permute(0, 3, 1, 2) if channels_last else out
