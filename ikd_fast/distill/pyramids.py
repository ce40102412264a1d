"""Student and teacher pyramids side by side: they must agree, or be made to by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

MATCHES = (None, "resize")


def match_pyramids(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    source: object,
    match: str | None = None,
    *,
    levels: Sequence[int] | None = None,
    input_size: tuple[int, int] | None = None,
    loss: str = "features",
) -> tuple[list[Tensor], list[Tensor]]:
    """Check length and strides of the levels in use; ``match="resize"`` brings student maps to the teacher's size (bilinear).

    Args:
        levels: indices in use; None means all, and then both sides must have equally many.
        input_size: (h, w) of the images, so that an error can name strides.
        loss: who the maps are for, in errors.

    >>> import torch
    >>> maps = [torch.zeros(1, 4, s, s) for s in (8, 4, 2)]
    >>> [len(side) for side in match_pyramids(maps, maps[:2], "neck", levels=[0, 1])]
    [2, 2]
    """
    if match not in MATCHES:
        raise ValueError(f"match must be one of {list(MATCHES)}, got {match!r}")
    if len(student) != len(teacher):
        shared = min(len(student), len(teacher))
        if levels is None or max(levels, default=0) >= shared:
            raise ValueError(
                f"{loss} at {source!r}: student has {len(student)} levels {_sizes(student, input_size)}, teacher {len(teacher)} "
                f"{_sizes(teacher, input_size)}; choose with levels=[...] on this loss those that both have, or taps with equal "
                "levels (features= and teacher_features=)"
            )
        student, teacher = student[:shared], teacher[:shared]
    chosen = range(len(student)) if levels is None else levels
    out = list(student)
    for level in chosen:
        if level >= len(student):
            continue  # the loss says which indices there are
        s, t = student[level], teacher[level]
        if s.shape[-2:] != t.shape[-2:]:
            if match is None:
                raise ValueError(
                    f"{loss} at {source!r}: level {level} is {tuple(s.shape[-2:])} in the student and {tuple(t.shape[-2:])} in the "
                    f"teacher (another stride): student {_sizes(student, input_size)}, teacher {_sizes(teacher, input_size)}. Tap "
                    "modules of equal stride, features=[...] for the student and teacher_features=[...] for the teacher, choose "
                    "with levels=[...] on this loss the levels that agree, or write match='resize'"
                )
            out[level] = F.interpolate(s, size=t.shape[-2:], mode="bilinear", align_corners=False)
    return out, list(teacher)


def _sizes(maps: Sequence[Tensor], input_size: tuple[int, int] | None) -> str:
    """Strides where the input is known, else sizes."""
    if input_size is None:
        return str([tuple(m.shape[-2:]) for m in maps])
    return f"of strides {[round(input_size[0] / m.shape[-2]) for m in maps]}"
