"""``python -m benchmarks.end_to_end.losses [--rounds N] [--size paper|small]``: each loss, forward and backward, beside FGD.

Maps are those of RetinaNet's neck: five levels of strides 8 to 128. A round times every loss once, in turn, starting with another
one each time, and the ratio is to FGD's time in the same round; the last column of the table in docs/losses.md is printed. Times
are CPU seconds of one thread, which other processes on the machine disturb less than the clock.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ikd_fast.losses import DistillContext, KDLoss, build_loss
from ikd_fast.losses.registry import loss_names

from .measure import quartiles

IMAGES, BOXES = 2, 20
BESIDE = "FGDLoss"
ARGUMENTS: dict[str, dict] = {"NADLoss": {"weight": 1.0}}  # its published weights are of three blocks


@dataclass(frozen=True)
class Size:
    channels: int
    input_size: tuple[int, int]

    def maps(self) -> list[tuple[int, int]]:
        h, w = self.input_size
        return [(-(-h // s), -(-w // s)) for s in (8, 16, 32, 64, 128)]


SIZES = {"paper": Size(256, (800, 1344)), "small": Size(32, (128, 160))}


class Work:
    """The pyramids and the context that every loss gets."""

    def __init__(self, size: Size, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size = size
        shapes = [(IMAGES, size.channels, h, w) for h, w in size.maps()]
        self.student = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
        self.teacher = [torch.randn(s, generator=generator) for s in shapes]
        h, w = size.input_size
        corner = torch.rand(IMAGES, BOXES, 2, generator=generator) * 0.7
        side = torch.rand(IMAGES, BOXES, 2, generator=generator) * 0.3
        boxes = torch.cat([corner, corner + side], 2) * torch.tensor([w, h, w, h])
        self.ctx = DistillContext(
            boxes=list(boxes),
            labels=None,
            image_sizes=[(h, w)] * IMAGES,
            input_size=(h, w),
            image_ids=list(range(IMAGES)),
        )

    def loss(self, name: str) -> KDLoss:
        loss = build_loss({"type": name, **ARGUMENTS.get(name, {})})
        channels = [self.size.channels] * len(self.student)
        loss.bind(channels, channels)
        return loss

    def run(self, loss: KDLoss) -> float:
        """CPU seconds of a forward and a backward; gradients are dropped afterwards."""
        start = time.process_time()
        values = loss(self.student, self.teacher, self.ctx)
        total: Tensor = sum(values.values()) if isinstance(values, dict) else values
        total.backward()
        seconds = time.process_time() - start
        loss.zero_grad(set_to_none=True)
        for x in self.student:
            x.grad = None
        return seconds


def ratios(
    names: Sequence[str], rounds: int, size: Size, say: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, list[float]], list[float]]:
    """Each loss's time over FGD's, and FGD's seconds, an entry a round; one round before them warms up."""
    work = Work(size)
    losses = {name: work.loss(name) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    seconds: list[float] = []
    for i in range(rounds + 1):
        order = list(names[i % len(names) :]) + list(names[: i % len(names)])
        taken = {name: work.run(losses[name]) for name in order}
        if i == 0:
            continue
        for name in names:
            found[name].append(taken[name] / taken[BESIDE])
        seconds.append(taken[BESIDE])
        say(f"round {i} of {rounds}")
    return found, seconds


def cell(values: Sequence[float]) -> str:
    """``median (q1 to q3)``, as docs/losses.md has it."""
    q1, median, q3 = quartiles(values)
    return f"{median:.2f} ({q1:.2f} to {q3:.2f})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end.losses", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", choices=sorted(SIZES), default="paper")
    parser.add_argument("--only", nargs="+", metavar="LOSS", help="some of the losses, beside FGD")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds must be 2 or more, for quartiles, got {arguments.rounds}")
    known = loss_names()
    for name in arguments.only or ():
        if name not in known:
            parser.error(f"unknown loss {name!r}; valid: {', '.join(known)}")
    names = [n for n in known if arguments.only is None or n in arguments.only or n == BESIDE]
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    found, seconds = ratios(names, arguments.rounds, SIZES[arguments.size], say=print)
    q1, median, q3 = quartiles([1e3 * s for s in seconds])
    print(
        f"one thread, load {load:.1f} before, {arguments.rounds} rounds; {BESIDE} {median:.0f} ms ({q1:.0f} to {q3:.0f})"
    )
    for name in names:
        print(f"| {name} | {cell(found[name])} |")


if __name__ == "__main__":
    main()
