"""DI2-FGSM as torchattacks 3.5 has it, on images in 0..1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn


def build(
    net: nn.Module, *, eps: float, step: float, steps: int, prob: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """``(images, labels) -> adversarial images``; ``eps`` and ``step`` in grey levels."""
    pytest.importorskip("torchattacks", reason="torchattacks is not installed (requirements/bench.txt)")
    from torchattacks import DIFGSM

    return DIFGSM(net, eps=eps / 255, alpha=step / 255, steps=steps, diversity_prob=prob)
