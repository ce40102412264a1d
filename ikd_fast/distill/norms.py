"""Batch statistics without a trace: the adversarial pass must not move the student's running averages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def suspend_running_stats(net: nn.Module) -> Iterator[None]:
    """Norms in training mode go on using batch statistics but do not update running mean, variance or counters."""
    live = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    replayed = [name for name, m in net.named_modules() if getattr(m, "with_cp", False)]
    if live and replayed:
        raise ValueError(
            f"{replayed[0]} recomputes its forward in backward (with_cp=True), where running statistics can no longer be "
            "suspended; write with_cp=False, or freeze the norms (norm_eval=True)"
        )
    for module in live:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in live:
            module.track_running_stats = True


def require_equal_branches(student: nn.Module, fraction: float) -> None:
    """Raise where a rank without attacked images would leave the others waiting in the student's synchronised norms."""
    if fraction == 1 or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for name, module in student.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            raise ValueError(
                f"fraction={fraction:g} leaves ranks without an adversarial branch in some steps, while {name} (SyncBatchNorm) of the "
                "student waits for all of them in it: write fraction=1, norm_eval=True, or a BatchNorm that is not synchronised"
            )
