"""Tells a victim whose loss is NaN, without waiting for a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_waiting: list[tuple[torch.cuda.Event, Tensor, list[int]]] = []


def look(value: Tensor, ids: Sequence[int]) -> None:
    """Raise where a value (``[N]`` or a scalar) is NaN: now on a CPU; on CUDA in the first call after the device got there."""
    if value.device.type == "cuda":
        _look_later(value.detach(), ids)
    elif value.device.type == "cpu":
        _check(value.detach().isnan(), ids)


def _look_later(value: Tensor, ids: Sequence[int]) -> None:
    while _waiting and _waiting[0][0].query():
        _, flags, of = _waiting.pop(0)
        _check(flags, of)
    if torch.cuda.is_current_stream_capturing():
        return
    flags = torch.empty(value.shape, dtype=torch.bool, pin_memory=True)
    flags.copy_(value.isnan(), non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(value.device))
    _waiting.append((event, flags, list(ids)))


def _check(flags: Tensor, ids: Sequence[int]) -> None:
    if not bool(flags.any()):
        return
    which = [i for i, bad in zip(ids, flags.tolist(), strict=True) if bad] if flags.dim() else list(ids)
    raise ValueError(
        f"the victim's loss is NaN, expected a number; images with ids {which[:8]}{' ...' if len(which) > 8 else ''}. Look at "
        "their boxes and labels, and at the teacher's weights; a loss that divides by the number of boxes needs one for images "
        "without any"
    )
