"""Checks that every operation on pyramids makes before anything is launched."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_pyramids(op: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Equal lengths, shapes, devices and batch; one floating dtype a side; no gradient asked of the teacher."""
    if len(student) != len(teacher) or not student:
        raise ValueError(
            f"{op}: expected pyramids of equal length >= 1, got {len(student)} student and {len(teacher)} "
            "teacher levels"
        )
    first = student[0]
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if s.ndim != 4 or s.shape != t.shape or s.shape[0] != first.shape[0]:
            raise ValueError(
                f"{op}, level {i}: expected maps [{first.shape[0]},C,H,W] of equal shape, got student "
                f"{tuple(s.shape)} and teacher {tuple(t.shape)}"
            )
        for side, x, like in (("student", s, first), ("teacher", t, teacher[0])):
            if x.dtype not in FLOATING:
                raise TypeError(
                    f"{op}, level {i}: expected a floating-point {side} map (fp16, bf16, fp32, fp64), got {x.dtype}"
                )
            if x.dtype != like.dtype:
                raise TypeError(
                    f"{op}, level {i}: expected {like.dtype} as the {side} map of level 0, got {x.dtype}"
                )
        if s.device != t.device or s.device != first.device:
            raise ValueError(
                f"{op}, level {i}: expected every map on {first.device}, got student on {s.device}, teacher on "
                f"{t.device}; move all to one device"
            )
        if t.requires_grad:
            raise ValueError(f"{op}, level {i}: the teacher map requires a gradient; pass map.detach()")


def check_valid(op: str, valid: Sequence[Tensor] | None, student: Sequence[Tensor]) -> list[Tensor]:
    """bool ``[N, H, W]`` for every level, or none."""
    if valid is None:
        return []
    if len(valid) != len(student):
        raise ValueError(f"{op}: expected one valid mask for each of {len(student)} levels, got {len(valid)}")
    for i, (v, s) in enumerate(zip(valid, student, strict=True)):
        shape = (s.shape[0], *s.shape[2:])
        if v.dtype != torch.bool or v.shape != shape or v.device != s.device:
            raise ValueError(
                f"{op}, level {i}: expected a bool valid mask {tuple(shape)} on {s.device}, got {v.dtype} "
                f"{tuple(v.shape)} on {v.device}"
            )
    return list(valid)


def working(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> torch.dtype:
    """What is computed in: float64 where a side has it, else float32."""
    return torch.float64 if torch.float64 in (student[0].dtype, teacher[0].dtype) else torch.float32


def savable(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps that autograd may keep: those made under ``torch.inference_mode`` are copied, others are not."""
    return [x.clone() if x.is_inference() else x for x in maps]


def check_temperature(op: str, tau: float) -> None:
    if not tau > 0 or math.isinf(tau):
        raise ValueError(f"{op}: the temperature must be a finite number > 0, got {tau}")
