"""Precision of every reference: float32 inside for fp16, bf16, fp32; float64 stays; never under autocast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def full(x: Tensor) -> Tensor:
    """``x`` in the dtype the reference computes in."""
    return x if x.dtype == torch.float64 else x.float()


def no_autocast(x: Tensor) -> torch.autocast:
    """A context in which autocast does not lower the precision of work on ``x``'s device."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def check_pyramids(op: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Equal lengths, shapes, devices and batch; floating point; no gradient asked of the teacher."""
    if len(student) != len(teacher) or not student:
        raise ValueError(
            f"{op}: expected pyramids of equal length >= 1, got {len(student)} student and {len(teacher)} "
            "teacher levels"
        )
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if s.ndim != 4 or s.shape != t.shape or s.shape[0] != student[0].shape[0]:
            raise ValueError(
                f"{op}, level {i}: expected maps [{student[0].shape[0]},C,H,W] of equal shape, got student "
                f"{tuple(s.shape)} and teacher {tuple(t.shape)}"
            )
        if not (s.is_floating_point() and t.is_floating_point()):
            raise TypeError(
                f"{op}, level {i}: expected floating-point maps, got student {s.dtype} and teacher {t.dtype}"
            )
        if s.device != t.device:
            raise ValueError(
                f"{op}, level {i}: student on {s.device}, teacher on {t.device}; move both to one device"
            )
        if t.requires_grad:
            raise ValueError(f"{op}, level {i}: the teacher map requires a gradient; pass map.detach()")


def check_temperature(op: str, tau: float) -> None:
    if not tau > 0 or tau == float("inf"):
        raise ValueError(f"{op}: the temperature must be a finite number > 0, got {tau}")
