"""What the benchmarks of operations on two pyramids share: the maps, and a step forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

N = 2
STRIDES = (8, 16, 32, 64, 128)

Pair = tuple[list[Tensor], list[Tensor], Tensor]


def random_pair(
    channels: int,
    image: tuple[int, int],
    *,
    per_image: bool = True,
    draw: Callable[..., Tensor] = torch.randn,
    above: int = 0,
) -> Pair:
    """Student and teacher maps of strides 8 to 128 with sides larger than ``above``, and a weight for each of the values."""
    g = torch.Generator().manual_seed(0)
    sizes = [tuple(-(-side // stride) for side in image) for stride in STRIDES]
    shapes = [(N, channels, *size) for size in sizes if min(size) > above]
    student = [draw(shape, generator=g).requires_grad_() for shape in shapes]
    teacher = [draw(shape, generator=g) for shape in shapes]
    return student, teacher, torch.rand((len(shapes), N) if per_image else len(shapes), generator=g)


def step(
    form: Callable[..., Tensor], student: list[Tensor], teacher: list[Tensor], weight: Tensor
) -> tuple[Tensor, ...]:
    """The values and the student's gradients."""
    value = form(student, teacher)
    return value.detach(), *torch.autograd.grad((value * weight).sum(), student)
