"""What is kept of one image, and what a memory was made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Record:
    """One image's perturbation.

    Attributes:
        size: (H, W) of the canonical image it is for, pixels.
        visits: how often the image has been met.
        step: training step that wrote it.
        delta: flat uint8, the cells' codes packed by :class:`~ikd_fast.kernels.DeltaCodes`.
        velocity: float16 ``[C, Hc, Wc]``, the momentum of each cell; None without momentum.
    """

    size: tuple[int, int]
    visits: int
    step: int
    delta: Tensor
    velocity: Tensor | None = None

    @property
    def nbytes(self) -> int:
        velocity = 0 if self.velocity is None else self.velocity.numel() * self.velocity.element_size()
        return self.delta.numel() + velocity


@dataclass(frozen=True)
class MemorySettings:
    """What perturbations are made with and for: two runs may share them only where these agree.

    Args:
        eps, step: radius and step of the attack, grey levels of 255.
        momentum: decay of the velocity; above 0 one is kept with each record.
        channels: of the images.
        data: fingerprint of the data set; ``""``: not said, agrees with any.
        size: how canonical sizes come about (``"original"``, ``"network 1333x800"``); ``""``: not said.
        objective: what is climbed; ``""``: not said.
        teacher: hash of the victim's weights; ``""``: not said.
        order: of the channels, ``"rgb"`` or ``"bgr"``; ``""``: not said.
    """

    eps: float
    step: float
    momentum: float = 0.0
    channels: int = 3
    data: str = ""
    size: str = ""
    objective: str = ""
    teacher: str = ""
    order: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``"eps: 8 there, 4 now"`` for each setting that both say and say differently."""
    return [
        f"{name}: {there[name]} there, {value} now"
        for name, value in now.items()
        if name in there and "" not in (there[name], value) and there[name] != value
    ]
