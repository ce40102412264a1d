"""Every step's losses and time, kept with the checkpoints."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ikd_fast.files import write_bytes

from mmengine.hooks import Hook
from mmengine.runner import Runner

Advance = Callable[[int, int], None]
"""Called with (steps done, steps in all) after each training step."""

READ_EVERY = 20
"""Steps between two readings from a device: each waits for it."""


def read_history(work_dir: Path) -> list[dict[str, float]]:
    """The history that an earlier run left in ``work_dir``."""
    path = work_dir / "losses.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, wherever the folder has been moved to since."""
    pointer = folder / "last_checkpoint"
    path = folder / Path(pointer.read_text().strip()).name if pointer.is_file() else None
    return path if path is not None and path.is_file() else None


def seconds_per_step(history: list[dict[str, float]]) -> float:
    """Mean over the steps but the first, which allocates, and those that were measured term by term."""
    plain = [row for row in history[1:] if not any(key.startswith("gradshare/") for key in row)]
    return statistics.fmean([row["seconds"] for row in plain or history[1:] or history[:1]])


class HistoryHook(Hook):
    """Collects the scalars of every step and reports progress.

    On a device the scalars are read every 20 steps, and ``seconds`` is the mean of those steps. ``require_finite``: a loss that
    is not finite ends the run with a FloatingPointError.
    """

    def __init__(
        self,
        work_dir: Path,
        history: list[dict[str, float]],
        advance: Advance,
        *,
        require_finite: bool = False,
    ) -> None:
        self.work_dir, self.history, self.advance = work_dir, history, advance
        self.require_finite = require_finite
        self._unread: list[tuple[int, dict[str, Any]]] = []

    def before_train(self, runner: Runner) -> None:
        # A run killed between history and checkpoint repeats its last epoch.
        del self.history[runner.iter :]
        self.advance(runner.iter, runner.max_iters)
        self.started = time.perf_counter()

    def before_train_epoch(self, runner: Runner) -> None:
        self._read()
        self.started = time.perf_counter()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        scalars = {key: value for key, value in (outputs or {}).items() if _is_scalar(value)}
        self._unread.append((runner.iter, scalars))
        here = all(v.device.type == "cpu" for v in scalars.values() if isinstance(v, torch.Tensor))
        if here or len(self._unread) >= READ_EVERY:
            self._read()
        self.advance(runner.iter + 1, runner.max_iters)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._read()
        text = "".join(json.dumps(row) + "\n" for row in self.history)
        write_bytes(self.work_dir / "losses.jsonl", text.encode())

    def after_train(self, runner: Runner) -> None:
        self._read()

    def _read(self) -> None:
        """All unread scalars at once; the device's work is then done, so the clock is that of the steps."""
        if not self._unread:
            return
        tensors = [
            v.detach().reshape(()).double()
            for _, row in self._unread
            for v in row.values()
            if isinstance(v, torch.Tensor)
        ]
        values = iter(torch.stack(tensors).tolist() if tensors else [])
        now = time.perf_counter()
        seconds = (now - self.started) / len(self._unread)
        self.started = now
        for step, row in self._unread:
            numbers = {k: next(values) if isinstance(v, torch.Tensor) else float(v) for k, v in row.items()}
            self.history.append({"step": step, "seconds": seconds, **numbers})
        first = len(self.history) - len(self._unread)
        self._unread = []
        if self.require_finite:
            for row in self.history[first:]:
                if not math.isfinite(row.get("loss", 0.0)):
                    raise FloatingPointError(_what_is_wrong(row))


def _what_is_wrong(row: dict[str, float]) -> str:
    parts = [f"{key} {value:g}" for key, value in row.items() if "loss" in key and key != "loss"]
    return f"the loss is {row['loss']:g} at step {int(row['step']) + 1}: {', '.join(parts)}"


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)
