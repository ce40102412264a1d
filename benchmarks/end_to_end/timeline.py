"""Where a step's time goes: stamps at the borders between its parts, the work itself untouched."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PARTS = ("data", "augmentation", "teacher", "attack", "student", "losses")
"""``teacher``: forwards of its backbone and pyramid that give maps to distil. ``attack``: all else that the adversarial images take.
``student``: forwards, backward, optimizer, and its own losses. ``losses``: the KD losses forward and backward, and the logs."""


class Timeline:
    """Exclusive time of each part: whatever is entered last is charged until it is left.

    A stamp is the clock on a CPU and an event on a GPU, so nothing is waited for before :meth:`seconds`.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.cuda = device is not None and device.type == "cuda"
        self.stack: list[str] = []
        self.stamps: list[tuple[Any, str | None]] = []

    @property
    def part(self) -> str:
        """The part that is charged now."""
        return self.stack[-1] if self.stack else "outside"

    def clear(self) -> None:
        self.stack.clear()
        self.stamps.clear()

    def enter(self, part: str) -> None:
        self.stack.append(part)
        self._stamp()

    def leave(self) -> None:
        self.stack.pop()
        self._stamp()

    def switch(self, part: str) -> None:
        """Charge ``part`` instead of the one entered last, if any; for the borders inside a backward pass."""
        if self.stack:
            self.stack[-1] = part
            self._stamp()

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        self.enter(part)
        try:
            yield
        finally:
            self.leave()

    def _stamp(self) -> None:
        now: Any = time.perf_counter()
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.stamps.append((now, self.stack[-1] if self.stack else None))

    def seconds(self) -> dict[str, float]:
        """Of every part since :meth:`clear`; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        spent: Counter[str] = Counter(dict.fromkeys(PARTS, 0.0))
        for (start, part), (end, _) in zip(self.stamps, self.stamps[1:], strict=False):
            if part is not None:
                spent[part] += start.elapsed_time(end) / 1e3 if self.cuda else end - start
        return dict(spent)

    def wrapped(self, part: str, call: Callable) -> Callable:
        """``call``, charged to ``part``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.within(part):
                return call(*args, **kwargs)

        return run


def charged_backward(timeline: Timeline, loss: Any, forward: Callable) -> Callable:
    """The loss's forward and backward charged to ``losses``.

    Autograd runs what was made last first, so the backward of a loss runs from its value to the last of the student's maps with
    nothing else between. The maps are passed as aliases of their own: a hook on the map itself would wait for its other uses.
    """

    def run(student: Sequence[Tensor], teacher: Sequence[Tensor], ctx: Any) -> Any:
        with timeline.within("losses"):
            maps = [m.view_as(m) for m in student]
            left = [0]

            def ended(_: Tensor) -> None:
                left[0] -= 1
                if left[0] == 0:
                    timeline.switch("student")

            def began(_: Tensor) -> None:
                if timeline.part != "losses":
                    timeline.switch("losses")

            value = forward(maps, teacher, ctx)
            terms = [value] if isinstance(value, Tensor) else list(value.values())
            chosen = loss.selected(len(maps))
            left[0] = sum(maps[i].requires_grad for i in chosen)
            for i in chosen:
                if maps[i].requires_grad:
                    maps[i].register_hook(ended)
            for term in terms:
                if term.requires_grad:
                    term.register_hook(began)
            return value

    return run
