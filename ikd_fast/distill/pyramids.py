"""Student and teacher pyramids side by side: they must agree, or be made to by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

MATCHES = (None, "resize")


def match_pyramids(
    student: Sequence[Tensor], teacher: Sequence[Tensor], source: object, match: str | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Check length and strides; ``match="resize"`` brings student maps to the teacher's size (bilinear)."""
    if match not in MATCHES:
        raise ValueError(f"match must be one of {list(MATCHES)}, got {match!r}")
    if len(student) != len(teacher):
        raise ValueError(
            f"features {source!r}: student has {len(student)} levels {_sizes(student)}, teacher {len(teacher)} {_sizes(teacher)}; "
            "choose taps with equal levels (features= and teacher_features=)"
        )
    out = []
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if s.shape[-2:] != t.shape[-2:]:
            if match is None:
                raise ValueError(
                    f"features {source!r}: level {level} is {tuple(s.shape[-2:])} in the student and {tuple(t.shape[-2:])} in the "
                    "teacher (another stride); tap levels of equal stride, or write match='resize'"
                )
            s = F.interpolate(s, size=t.shape[-2:], mode="bilinear", align_corners=False)
        out.append(s)
    return out, list(teacher)


def _sizes(maps: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(m.shape[-2:]) for m in maps]
