"""Multiply-adds of a step, counted as it runs: forward, and backward to images and to weights, by part of the step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class CountFlops(TorchDispatchMode):
    """Floating point operations of convolutions and matrix products; ``FlopCounterMode`` does not survive an attack's
    ``autograd.grad``.

    Args:
        part: says, whenever an operation runs, which part of the step it belongs to; ``parts`` then holds the sums.

    Attributes:
        total: of all. ``forward``, ``backward``: of convolutions and of what runs in autograd's backward; a gradient that nobody
            asked for is not computed and not counted.
    """

    def __init__(self, part: Callable[[], str] = lambda: "all") -> None:
        super().__init__()
        self.total = self.forward = self.backward = 0
        self.part = part
        self.parts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            flops = int(count(*args, **(kwargs or {}), out_val=out))
            self.total += flops
            self.parts[self.part()] += flops
            if func.overloadpacket.__name__.endswith("backward"):
                self.backward += flops
            else:
                self.forward += flops
        return out

    @property
    def gmac(self) -> float:
        """10^9 multiply-adds, two operations each."""
        return self.total / 2e9


def gmac_of(run: Callable[[], Any]) -> float:
    """10^9 multiply-adds of a call.

    >>> import torch
    >>> a, b = torch.zeros(10, 20), torch.zeros(20, 30)
    >>> gmac_of(lambda: a @ b) * 1e9
    6000.0
    """
    with CountFlops() as count:
        run()
    return count.gmac
