"""Precision of every reference: float32 inside for fp16, bf16, fp32; float64 stays; never under autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def full(x: Tensor) -> Tensor:
    """``x`` in the dtype the reference computes in."""
    return x if x.dtype == torch.float64 else x.float()


def no_autocast(x: Tensor) -> torch.autocast:
    """A context in which autocast does not lower the precision of work on ``x``'s device."""
    return torch.autocast(device_type=x.device.type, enabled=False)
