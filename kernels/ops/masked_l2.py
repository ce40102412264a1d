"""A pyramid times MGD's keyed mask: the operation, which is its own gradient."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.masked_l2 import LEVELS
from .backend import check_backend, room
from .checks import FLOATING

STEM = "masked_l2"


def _mask(
    maps: list[Tensor],
    dtype: torch.dtype,
    ids: Tensor,
    levels: list[int],
    seed: int,
    epoch: int,
    ratio: float,
    backend: str,
) -> list[Tensor]:
    chosen = torch.float64 if torch.float64 in (maps[0].dtype, dtype) else maps[0].dtype
    out: list[Tensor] = room(STEM, backend, maps[0].device, chosen).mask(
        maps, dtype, ids.tolist(), levels, seed % (1 << 64), epoch, ratio
    )
    return out


# For torch.compile and export; eager mode calls the same function through _Mask.
_op = torch.library.custom_op("ikd_fast::mask_maps", mutates_args=())(_mask)


@_op.register_fake
def _(maps, dtype, ids, levels, seed, epoch, ratio, backend):
    return [torch.empty_like(x, dtype=dtype) for x in maps]


def _setup(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    maps, _, *ctx.key = inputs
    ctx.dtype, ctx.levels = maps[0].dtype, len(maps)


def _gradient(ctx: Any, grads: list[Tensor]) -> tuple:
    return _op(list(grads), ctx.dtype, *ctx.key), *[None] * 7


_op.register_autograd(_gradient, setup_context=_setup)


class _Mask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, key: tuple, *maps: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype, ctx.key = maps[0].dtype, key
        return tuple(_mask(list(maps), dtype, *key))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return None, None, *_Mask.apply(ctx.dtype, ctx.key, *grads)


def _integer(what: str, value: Any) -> int:
    if isinstance(value, int):  # torch.compile takes operator.index for a request to bake the number in
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"mask_maps: {what} must be an integer, got {value!r} of {type(value).__name__}"
        ) from None


def _signed(value: int) -> int:
    """The same 64 bits as an int64, which is what a registered operation takes."""
    if -(1 << 63) <= value < 1 << 63:
        return value
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


def _ids(image_ids: Sequence[int] | Tensor, count: int) -> Tensor:
    """int64 ``[N]`` on the host."""
    if len(image_ids) != count:
        raise ValueError(
            f"mask_maps: expected one image id for each of the {count} images, got {len(image_ids)}"
        )
    if not isinstance(image_ids, Tensor):
        return torch.tensor(
            [_signed(_integer("an image id", i)) for i in image_ids], dtype=torch.int64, device="cpu"
        )
    if image_ids.dtype != torch.int64 or image_ids.ndim != 1 or image_ids.device.type != "cpu":
        raise TypeError(
            f"mask_maps: expected image ids as int64 [{count}] on the CPU, got {image_ids.dtype} "
            f"{tuple(image_ids.shape)} on {image_ids.device}"
        )
    return image_ids


def _check_maps(student: Sequence[Tensor] | Tensor) -> None:
    if isinstance(student, Tensor) or not student:
        got = f"a tensor {tuple(student.shape)}" if isinstance(student, Tensor) else "no level"
        raise ValueError(f"mask_maps: expected a list of maps [N,C,H,W], one a level, got {got}")
    first = student[0]
    for i, x in enumerate(student):
        if x.ndim != 4 or x.shape[0] != first.shape[0]:
            n = first.shape[0] if first.ndim == 4 else "N"
            raise ValueError(f"mask_maps, level {i}: expected a map [{n},C,H,W], got {tuple(x.shape)}")
        if x.dtype not in FLOATING:
            raise TypeError(
                f"mask_maps, level {i}: expected a floating-point map (fp16, bf16, fp32, fp64), got {x.dtype}"
            )
        if x.dtype != first.dtype or x.device != first.device:
            raise (TypeError if x.dtype != first.dtype else ValueError)(
                f"mask_maps, level {i}: expected {first.dtype} on {first.device} as at level 0, got {x.dtype} on "
                f"{x.device}"
            )


def _check_levels(levels: Sequence[int] | None, count: int) -> list[int]:
    if levels is None:
        return list(range(count))
    if len(levels) != count:
        raise ValueError(f"mask_maps: expected one level index for each of {count} maps, got {len(levels)}")
    chosen = [_integer("a level index", i) for i in levels]
    if any(not 0 <= i < LEVELS for i in chosen):
        raise ValueError(f"mask_maps: level indices must be in 0..2**24-1, got {chosen}")
    return chosen


def mask_maps(
    student: Sequence[Tensor],
    image_ids: Sequence[int] | Tensor,
    *,
    ratio: float,
    levels: Sequence[int] | None = None,
    seed: int,
    epoch: int,
    backend: str = "auto",
) -> list[Tensor]:
    """``out_l = S_l * m_l`` with ``m_l = keyed_mask(image_ids, H_l, W_l, level=levels[l], ...)`` for every level.

    The masks, one draw shared by all channels, are never stored: on a GPU they are computed where they are
    multiplied, in one launch for the whole pyramid.

    Args:
        student: maps ``[N, C, H, W]`` of one dtype, fp16, bf16, fp32 or fp64, contiguous, channels_last or any
            strides, each level of its own C, H, W.
        image_ids: the 64-bit keys of the N images, host integers; or int64 ``[N]`` on the CPU with the same
            bits, for compiled steps: an integer of 2**63 or more may make them compile anew, a tensor does not.
        ratio: fraction of positions set to zero, 0..1.
        levels: the pyramid index of each map, which chooses its random stream; None means 0, 1, 2, ...
        seed, epoch: the rest of the key, 0..2**64-1 and 0..2**32-1.
        backend: ``"auto"`` (Triton on CUDA, else the reference), ``"triton"`` or ``"reference"``.

    Returns:
        float32 maps (float64 of float64) in the layouts of the given ones. The gradient, ``m_l`` times the
        upstream one, comes in the student's dtype and can itself be differentiated.

    It is a product, as published: NaN and infinity at a masked position give NaN.

    Raises:
        ValueError, TypeError: maps of different batch, dtype or device, not one id an image, a key or a ratio
            outside its range, an image of 2**31 elements: before any launch.

    >>> out = mask_maps([torch.ones(2, 3, 4, 4)], [7, 8], ratio=0.5, seed=0, epoch=1)[0]
    >>> sorted(set(out.flatten().tolist())), bool((out[:, 0] == out[:, 2]).all())
    ([0.0, 1.0], True)
    """
    check_backend("mask_maps", backend)
    _check_maps(student)
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"mask_maps: ratio, the fraction set to zero, must be in 0..1, got {ratio}")
    seed, epoch = _integer("seed", seed), _integer("epoch", epoch)
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"mask_maps: seed must be in 0..2**64-1, got {seed}")
    if not 0 <= epoch < 1 << 32:
        raise ValueError(f"mask_maps: epoch must be in 0..2**32-1, got {epoch}")
    ids = _ids(image_ids, student[0].shape[0])
    key = (ids, _check_levels(levels, len(student)), _signed(seed), epoch, float(ratio), backend)
    dtype = torch.float64 if student[0].dtype == torch.float64 else torch.float32
    if torch.compiler.is_compiling():
        return _op(list(student), dtype, *key)
    return list(_Mask.apply(dtype, key, *student))
