"""Train one net through mmengine's Runner: quiet, resumable, every step's losses kept. Imports mmdet."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ikd_fast.mmdet  # noqa: F401  (makes mmdet importable without compiled operators)
from ikd_fast.demo.quiet import quiet
from ikd_fast.files import write_bytes

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

Advance = Callable[[int, int], None]
"""Called with (steps done, steps in all) after each training step."""


def train(cfg: Config, advance: Advance) -> list[dict[str, float]]:
    """Run ``cfg`` to its end and return the history: one dict a step with ``step``, ``seconds`` and every logged scalar.

    What mmengine and pycocotools print goes to ``work_dir/console.log``. The history is in ``work_dir/losses.jsonl`` up to the
    last epoch's end, so it survives an interruption as the checkpoint does.
    """
    work_dir = Path(cfg.work_dir)
    history = read_history(work_dir)
    with quiet(work_dir / "console.log"):
        runner = Runner.from_cfg(cfg)
        runner.register_hook(HistoryHook(work_dir, history, advance), priority="LOWEST")
        runner.train()
    return history


def read_history(work_dir: Path) -> list[dict[str, float]]:
    """The history that an earlier run left in ``work_dir``."""
    path = work_dir / "losses.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def seconds_per_step(history: list[dict[str, float]]) -> float:
    """Mean over the steps but the first, which allocates."""
    return statistics.fmean([row["seconds"] for row in history][1:] or [history[0]["seconds"]])


class HistoryHook(Hook):
    """Collects the scalars of every step and reports progress."""

    def __init__(self, work_dir: Path, history: list[dict[str, float]], advance: Advance) -> None:
        self.work_dir, self.history, self.advance = work_dir, history, advance

    def before_train(self, runner: Runner) -> None:
        # A run killed between history and checkpoint repeats its last epoch.
        del self.history[runner.iter :]
        self.advance(runner.iter, runner.max_iters)

    def before_train_epoch(self, runner: Runner) -> None:
        self.started = time.perf_counter()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        now = time.perf_counter()
        scalars = {key: float(value) for key, value in (outputs or {}).items() if _is_scalar(value)}
        self.history.append({"step": runner.iter, "seconds": now - self.started, **scalars})
        self.started = now
        self.advance(runner.iter + 1, runner.max_iters)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self.history)
        write_bytes(self.work_dir / "losses.jsonl", text.encode())


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)
