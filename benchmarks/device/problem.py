"""What a measured problem is, and at which shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Outputs = Sequence[Tensor]


@dataclass(frozen=True)
class Scale:
    """What "the papers' shapes" means: the whole or, for a dry run, a little of it."""

    image: tuple[int, int] = (800, 1344)
    decoded: tuple[int, int] = (800, 1333)
    channels: int = 256
    batches: tuple[int, ...] = (1, 2, 16)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    squares: tuple[tuple[int, int], ...] = ((256, 224), (600, 512), (1280, 1024))
    square_batch: int = 32
    compiler: str = "inductor"
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)

    def levels(self) -> list[tuple[int, int]]:
        return [(-(-self.image[0] // s), -(-self.image[1] // s)) for s in self.strides]


DRY = Scale((16, 32), (16, 29), 8, (2,), (torch.float32,), ((16, 12),), 2, "aot_eager", (8, 16))


@dataclass
class Problem:
    """One operation at one shape.

    Attributes:
        op: whose tests must have passed.
        group: the work, in words; sides of a group are compared.
        make: seed -> inputs on the device.
        ours: name and call; ``peers``: the same. A call takes the inputs and gives tensors, gradients included.
        reference: the truth for the outputs, in float64 where the operation has it.
        moved: bytes that the work must move at the least, each operand once for each direction.
        inputs: bytes of one set of inputs; ``maps``: of both pyramids, which peak memory is compared with.
        tolerance: of ``|output - truth| / |truth|``, both as vectors.
        targets: peer -> how many times as fast ours is meant to be.
    """

    op: str
    group: str
    make: Callable[[int], Any]
    ours: tuple[str, Callable[[Any], Outputs]]
    peers: dict[str, Callable[[Any], Outputs]]
    reference: Callable[[Any], Outputs]
    moved: int
    inputs: int
    tolerance: float
    maps: int = 0
    targets: dict[str, float] = field(default_factory=dict)
    compiled: dict[str, Callable[[Any], Outputs]] = field(default_factory=dict)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
