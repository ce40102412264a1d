"""What the demo says while it works: one line a stage, bars with the time left on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ikd_fast.mmdet.history import Advance

COSTS = {"teacher": 1.5, "alone": 1.0, "fgd": 1.8, "fgd_ikd": 3.7}
"""Rough time of a step by model, relative to the student alone, so that the time left means something early."""


class Report:
    """Writes to ``console``. The time left is that of the trainings announced by :meth:`plan`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.total, self.spent, self.started = 0.0, 0.0, time.monotonic()
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
        )
        self.progress = Progress(
            *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
            transient=True, disable=not console.is_terminal, speed_estimate_period=120,
        )  # fmt: skip

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def plan(self, name: str, steps: int) -> None:
        """A training to come."""
        self.total += COSTS[name] * steps

    def skip(self, name: str, steps: int) -> None:
        """A training that is done already."""
        self.total -= COSTS[name] * steps

    @contextmanager
    def training(self, name: str, title: str) -> Iterator[Advance]:
        """Show the progress of one training; the block's value is to be called with (done, total) after each step."""
        bar = self.progress.add_task(title, total=None, unit="steps")
        overall = self.progress.add_task(
            "all trainings", total=round(self.total), completed=round(self.spent), unit="units"
        )
        before, first, quarter = self.spent, -1, 0

        def advance(done: int, total: int) -> None:
            nonlocal first, quarter
            if first < 0:
                # A resumed training starts here: what an earlier call did costs this one nothing.
                first, quarter = done, 4 * done // total
                self.total -= COSTS[name] * done
            self.spent = before + COSTS[name] * (done - first)
            self.progress.update(bar, total=total, completed=done)
            self.progress.update(overall, total=round(self.total), completed=round(self.spent))
            if 4 * done // total > quarter and not self.console.is_terminal:
                quarter = 4 * done // total
                self.say(f"  {title}: step {done} of {total}, about {self._left()} left in all trainings")

        with self.progress:
            yield advance
        self.progress.remove_task(bar)
        self.progress.remove_task(overall)

    def _left(self) -> str:
        elapsed = time.monotonic() - self.started
        seconds = elapsed * (self.total - self.spent) / max(self.spent, 1e-9)
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
