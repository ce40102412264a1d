"""Sums of squared and of absolute differences of two pyramids, for each level and image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import check_pyramids, full


def pyramid_l2(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """``out[l, n] = sum over c, h, w of (S_l - T_l)^2``: ``[levels, N]``, float32 (or float64 as given).

    The maps are ``[N, C, H, W]``, any floating dtype and layout, each level of its own C, H, W. The gradient
    goes to the student; a teacher map that requires one is an error.

    >>> pyramid_l2([torch.full((1, 2, 3, 3), 2.0)], [torch.zeros(1, 2, 3, 3)])
    tensor([[72.]])
    """
    check_pyramids("pyramid_l2", student, teacher)
    return torch.stack(
        [(full(s) - full(t)).square().sum((1, 2, 3)) for s, t in zip(student, teacher, strict=True)]
    )


def pyramid_l1(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """``out[l, n] = sum over c, h, w of |S_l - T_l|``; otherwise as ``pyramid_l2``. The gradient at 0 is 0.

    >>> pyramid_l1([torch.full((1, 2, 3, 3), -2.0)], [torch.zeros(1, 2, 3, 3)])
    tensor([[36.]])
    """
    check_pyramids("pyramid_l1", student, teacher)
    return torch.stack(
        [(full(s) - full(t)).abs().sum((1, 2, 3)) for s, t in zip(student, teacher, strict=True)]
    )
