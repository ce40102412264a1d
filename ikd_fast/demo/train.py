"""Train one net through mmengine's Runner: quiet, resumable, every step's losses kept. Imports mmdet."""

from __future__ import annotations

from pathlib import Path

import ikd_fast.mmdet  # noqa: F401  (makes mmdet importable without compiled operators)
from ikd_fast.demo.quiet import quiet
from ikd_fast.mmdet.history import Advance, HistoryHook, read_history

from mmengine.config import Config
from mmengine.runner import Runner


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
