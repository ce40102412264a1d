"""Checks of what a loss is given: maps, boxes, levels, numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import DistillContext, KDLoss


def check_maps(where: str, s: Tensor, t: Tensor) -> None:
    """One level of both pyramids: floating ``[N, C, H, W]``, not empty, equal but for C, teacher detached."""
    for side, x in (("student", s), ("teacher", t)):
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(
                f"{where}: expected a floating-point {side} map [N,C,H,W], got {x.dtype} {tuple(x.shape)}"
            )
        if x.numel() == 0:
            raise ValueError(
                f"{where}: expected at least one element, got an empty {side} map {tuple(x.shape)}"
            )
    if s.device != t.device:
        raise ValueError(
            f"{where}: student map on {s.device}, teacher map on {t.device}; move both to one device"
        )
    if t.requires_grad:
        raise ValueError(
            f"{where}: the teacher map requires a gradient; run the teacher under torch.no_grad() or pass "
            "map.detach()"
        )
    if s.shape[0] != t.shape[0] or s.shape[2:] != t.shape[2:]:
        raise ValueError(
            f"{where}: expected maps of equal batch, height and width, got student {tuple(s.shape)} and "
            f"teacher {tuple(t.shape)}; nothing is resized, tap levels of equal stride"
        )


def check_boxes(ctx: DistillContext, like: Tensor) -> None:
    """One box list and one size an image, on the maps' device.

    Coordinates are read only where that costs no synchronisation, on a CPU and not under ``torch.compile``;
    elsewhere a bad box makes the masks, and so the loss, NaN.
    """
    n = like.shape[0]
    if len(ctx.boxes) != n or len(ctx.image_sizes) != n:
        raise ValueError(
            f"expected one box tensor and one image size for each of the {n} images of the batch, got "
            f"{len(ctx.boxes)} and {len(ctx.image_sizes)}"
        )
    for i, boxes in enumerate(ctx.boxes):
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(
                f"image {i}: expected boxes [n,4] xyxy in pixels, got {tuple(boxes.shape)}; no boxes is [0,4]"
            )
        if boxes.device != like.device:
            raise ValueError(
                f"image {i}: boxes on {boxes.device}, maps on {like.device}; write boxes.to(features.device)"
            )
        if boxes.device.type != "cpu" or torch.compiler.is_compiling():
            continue
        bad = ~(boxes.isfinite().all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1))
        if bool(bad.any()):
            k = int(bad.nonzero()[0])
            raise ValueError(
                f"image {i}, box {k}: expected finite xyxy, x1 <= x2, y1 <= y2, got {boxes[k].tolist()}"
            )


def check_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """Distinct indices >= 0."""
    chosen = tuple(levels) if isinstance(levels, Sequence) else ()
    ok = all(isinstance(i, int) and i >= 0 for i in chosen)
    if not chosen or not ok or len(set(chosen)) != len(chosen):
        raise ValueError(
            f"levels must be distinct indices >= 0, e.g. (0, 1, 2), or None for all; got {levels}"
        )
    return chosen


def check_number(owner: str, name: str, value: Any, *, above: float = -math.inf) -> float:
    """``value`` as a finite float greater than ``above``."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= above:
        bound = "" if above == -math.inf else f" > {above:g}"
        raise ValueError(f"{owner}: {name} must be a finite number{bound}, got {value!r}")
    return float(value)


def bind_from_arguments(
    loss: KDLoss,
    channels: int | Sequence[int] | None,
    teacher_channels: int | Sequence[int] | None,
    num_levels: int | None,
) -> None:
    """Bind a loss whose constructor was given channel counts: one for every level, or one a level."""
    label = type(loss).__name__
    if channels is None:
        if teacher_channels is not None or num_levels is not None:
            raise ValueError(f"{label}: teacher_channels and num_levels go with channels=, which is missing")
        return
    counts = [channels, channels if teacher_channels is None else teacher_channels]
    lengths = {len(c) for c in counts if not isinstance(c, int)}
    if num_levels is not None:
        lengths.add(num_levels)
    if not lengths and loss.levels is not None:
        lengths.add(max(loss.levels) + 1)
    if len(lengths) != 1:
        raise ValueError(
            f"{label}: channels={channels}, teacher_channels={teacher_channels}, num_levels={num_levels} do "
            "not give one number of levels; write e.g. channels=256, num_levels=5"
        )
    n = lengths.pop()
    student, teacher = ([c] * n if isinstance(c, int) else list(c) for c in counts)
    loss.bind(student, teacher)
