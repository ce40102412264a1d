"""Images and their packed perturbations to perturbed images: the operation and its checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..reference.delta_codes import CellMap, DeltaCodes
from .backend import check_backend, room
from .checks import FLOATING
from .plan import MAX_IMAGES

OP = "apply_delta"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _forward(
    images: Tensor,
    records: list[Tensor],
    cells: list[int],
    x_cell: list[Tensor],
    y_cell: list[Tensor],
    bits: int,
    levels: int,
    spacing: float,
    grey_level: list[float],
    low: list[float],
    high: list[float],
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    clean: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = room(OP, backend, images.device, images.dtype)
    out: tuple[Tensor, Tensor] = module.forward(
        images, records, cells, x_cell, y_cell, bits, levels, spacing, grey_level, low, high, mean, std, dtype, clean,
    )  # fmt: skip
    return out


_op = torch.library.custom_op("ikd_fast::apply_delta", mutates_args=())(_forward)


@_op.register_fake
def _(images, records, cells, x_cell, y_cell, bits, levels, spacing, grey_level, low, high, mean, std, dtype, clean,
      backend):  # fmt: skip
    out = torch.empty_like(images, dtype=dtype)
    return out, torch.empty_like(out) if clean else out.new_empty(0)


@overload
def apply_delta(
    images: Tensor,
    records: Sequence[Tensor],
    maps: Sequence[CellMap],
    codes: DeltaCodes,
    *,
    grey_level: Sequence[float] | None = None,
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    clean: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def apply_delta(
    images: Tensor,
    records: Sequence[Tensor],
    maps: Sequence[CellMap],
    codes: DeltaCodes,
    *,
    grey_level: Sequence[float] | None = None,
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    clean: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def apply_delta(
    images: Tensor,
    records: Sequence[Tensor],
    maps: Sequence[CellMap],
    codes: DeltaCodes,
    *,
    grey_level: Sequence[float] | None = None,
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    clean: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Unpack, map, add, clamp, normalise, cast: one launch for the batch on a GPU.

    Float images, in any units: ``clamp(x + grey_level[c] * value, min(low[c], x), max(high[c], x))``, value being that of
    the pixel's cell in grey levels; a pixel without a cell is x itself. uint8 images: ``(clamp(x + value, 0, 255) -
    mean[c]) / std[c]``; a pixel without a cell is 0. Computed in float32 (float64 of float64).

    Args:
        images: ``[N, C, H, W]``, fp16, bf16, fp32, fp64 or uint8; a padded batch. Contiguous or channels_last; with other
            strides it is copied first.
        records: N records of ``codes`` (see :class:`DeltaCodes`), on the images' device.
        maps: N :class:`CellMap` whose frame is (H, W).
        grey_level, low, high: size of one grey level and valid range in the images' units, one for each of the C
            channels; of float images, which need them.
        mean, std: normalisation in 0..255 units for each channel, of uint8 images; None leaves 0..255.
        dtype: of the output of uint8 images, float32 (default), float16 or bfloat16; float images keep theirs.
        clean: also return the same uint8 images without the perturbation, made in the same launch.
        backend: ``"auto"`` (Triton on CUDA, else the reference), ``"triton"`` or ``"reference"``.

    Returns:
        ``[N, C, H, W]`` in the memory format of ``images`` (contiguous of a copied one); with ``clean`` two of them,
        perturbed and clean. There is no gradient: the gradient with respect to the result is that of the perturbation in
        the images' units.

    Raises:
        ValueError, TypeError: other dtypes, devices or shapes than these, a record or map of another size, arguments of
            the other kind of images, images that require a gradient, an image of 2**31 elements: before any launch.

    >>> codes = DeltaCodes.of(eps=8, step=2)
    >>> record = codes.pack(codes.encode(torch.tensor([[[8.0, -8.0]]])))
    >>> y, x = torch.tensor([0], dtype=torch.int32), torch.tensor([1, 0, -1], dtype=torch.int32)  # mirrored, one padded
    >>> spans = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32)
    >>> view = CellMap((1, 2), x, y, spans[1], spans[0])
    >>> units = {"grey_level": [1 / 255], "low": [0.0], "high": [1.0]}
    >>> (255 * apply_delta(torch.full((1, 1, 1, 3), 0.2), [record], [view], codes, **units)).round().tolist()
    [[[[43.0, 59.0, 51.0]]]]
    """
    check_backend(OP, backend)
    pixels = images.dtype == torch.uint8
    check_cells(OP, "images", images, records, maps, codes, (torch.uint8, *FLOATING))
    units = {"grey_level": grey_level, "low": low, "high": high}
    scale = {"mean": mean, "std": std}
    if pixels:
        _refuse("uint8", {k: v for k, v in units.items() if v is not None}, "mean and std")
        if (mean is None) != (std is None):
            raise ValueError(f"{OP}: mean and std: expected both or neither, got mean={mean}, std={std}")
    else:
        _refuse(
            "float", {k: v for k, v in (scale | {"dtype": dtype}).items() if v is not None}, ", ".join(units)
        )
        if clean:
            raise ValueError(
                f"{OP}: clean=True is for uint8 images; float images are the clean ones themselves"
            )
        if missing := [k for k, v in units.items() if v is None]:
            raise ValueError(
                f"{OP}: float images need {', '.join(missing)}, one number for each of {images.shape[1]} channels"
            )
    numbers = [_numbers(k, v, images.shape[1]) for k, v in (units | scale).items()]
    _check_units(*numbers)
    dtype = images.dtype if not pixels else torch.float32 if dtype is None else dtype
    if pixels and dtype not in DTYPES:
        raise TypeError(f"{OP}: expected float32, float16 or bfloat16 as dtype, got {dtype}")
    if not (images.is_contiguous() or images.is_contiguous(memory_format=torch.channels_last)):
        images = images.contiguous()
    run: Any = _op if torch.compiler.is_compiling() else _forward
    out, plain = run(
        images, list(records), [n for m in maps for n in m.cells], [m.x_cell for m in maps], [m.y_cell for m in maps],
        codes.bits, codes.levels, codes.spacing, *numbers, dtype, clean, backend,
    )  # fmt: skip
    return (out, plain) if clean else out


def check_cells(
    op: str,
    name: str,
    x: Tensor,
    records: Sequence[Tensor],
    maps: Sequence[CellMap],
    codes: DeltaCodes,
    dtypes: Sequence[torch.dtype],
) -> None:
    """A stack, and for each of its images a record and a map that fit it."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{op}: {name}: expected [N, C, H, W], got {got}")
    if x.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name}: expected {expected}, got {x.dtype}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} requires a gradient, and there is none; write {name}.detach()")
    if len(x) > MAX_IMAGES:
        raise ValueError(f"{op}: expected at most {MAX_IMAGES} images, got {len(x)}")
    if not len(x) == len(records) == len(maps):
        raise ValueError(
            f"{op}: expected a record and a map for each of {len(x)} images, got {len(records)} records and {len(maps)} maps"
        )
    for i, (record, view) in enumerate(zip(records, maps, strict=True)):
        if view.frame != tuple(x.shape[2:]):
            raise ValueError(
                f"{op}: maps[{i}]: expected a map onto the frame {tuple(x.shape[2:])} (H, W), got {view.frame}"
            )
        codes.check_record(f"{op}: records[{i}]", record, x.shape[1], view.cells)
        if record.device != x.device:
            raise ValueError(f"{op}: records[{i}]: expected {x.device} as the {name}, got {record.device}")


def _refuse(kind: str, given: dict, instead: str) -> None:
    if given:
        raise ValueError(f"{OP}: {kind} images take {instead}, not {', '.join(given)}")


def _numbers(name: str, values: Sequence[float] | None, channels: int) -> list[float]:
    if values is None:
        return []
    row = [float(v) for v in values]
    if len(row) != channels or not all(math.isfinite(v) for v in row):
        raise ValueError(
            f"{OP}: {name}: expected a finite number for each of {channels} channels, got {tuple(values)}"
        )
    return row


def _check_units(
    grey_level: list[float], low: list[float], high: list[float], mean: list[float], std: list[float]
) -> None:
    if not all(v > 0 for v in grey_level):
        raise ValueError(f"{OP}: grey_level: expected numbers > 0, got {grey_level}")
    if not all(a <= b for a, b in zip(low, high, strict=True)):
        raise ValueError(f"{OP}: expected low <= high in every channel, got low={low}, high={high}")
    if not all(v > 0 for v in std):
        raise ValueError(f"{OP}: std: expected numbers > 0, got {std}")
