"""One run of a sweep, in a process of its own: ``python -m ikd_fast.mmdet.sweep.worker FOLDER``.

A process per run: registries, message hubs, allocator and CUDA context of one cannot reach the next, and a run that is killed takes
nothing along. What the run prints goes to stderr; stdout carries one JSON object a line, ``{"done": k, "total": n}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import ikd_fast.mmdet  # noqa: F401  (makes mmdet importable without compiled operators)
from ikd_fast.files import write_json
from ikd_fast.mmdet.history import Advance, HistoryHook, last_checkpoint, read_history, seconds_per_step
from ikd_fast.mmdet.launch import check_visualizer

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, set_random_seed

from .length import scale_schedule

CONFIG, SPEC, RESULT = "config.py", "run.json", "result.json"
INTERRUPTED = 130


def run(folder: Path, advance: Advance) -> dict[str, Any]:
    """Train and evaluate what ``folder`` describes, from its last checkpoint if there is one; returns and writes the result.

    ``folder``: ``config.py`` (complete, but for folder and weights to start from) and ``run.json`` (``scale``: the original
    ``train_cfg`` where the schedule is to be scaled; ``init``: file of the student's first weights, shared by the runs of a
    seed and drawn by the first of them, or None).
    """
    spec = json.loads((folder / SPEC).read_text())
    cfg = Config.fromfile(folder / CONFIG)
    check_visualizer(cfg)
    init_default_scope(cfg.get("default_scope") or "mmdet")
    cfg.work_dir = str(folder)
    # Runners of one process share loggers and message hubs by this name.
    cfg.experiment_name = f"{folder.name}_{time.time_ns()}"
    last = last_checkpoint(folder)
    if last is not None:
        cfg.resume, cfg.load_from = True, str(last)
    elif spec["init"] is not None:
        draw_student(cfg, Path(spec["init"]))
        cfg.load_from = spec["init"]
    history = read_history(folder)
    runner = Runner.from_cfg(cfg)
    if spec["scale"] is not None:
        scale_schedule(runner, spec["scale"])
    metrics = _Metrics()
    # Before the checkpoint hook: what is saved after a step has its row.
    runner.register_hook(HistoryHook(folder, history, advance, require_finite=True), priority="LOW")
    runner.register_hook(metrics)
    runner.train()
    if metrics.found is None:  # the earlier process ended between the last checkpoint and the evaluation
        runner.val()
    result = {
        "status": "done",
        "metrics": metrics.found,
        "steps": runner.iter,
        "seconds_per_step": round(seconds_per_step(history), 4),
        "balance": balance(history),
    }
    write_json(folder / RESULT, result)
    return result


def draw_student(cfg: Config, path: Path) -> None:
    """The weights that the runs of a seed start from: drawn once, so that no setting changes what the next one draws."""
    if path.is_file():
        return
    set_random_seed(cfg.randomness.seed)
    model = MODELS.build(cfg.model)
    model.init_weights()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(dict(state_dict=model.student.state_dict(), meta={}), partial)
    os.replace(partial, path)


def balance(history: Iterable[dict[str, float]]) -> dict[str, dict[str, float]]:
    """By term, over the calibrated steps: mean ``gradshare``, mean ``share`` of the loss where it is logged."""
    rows = [row for row in history if any(key.startswith("gradshare/") for key in row)]
    names = dict.fromkeys(
        key.removeprefix("gradshare/") for row in rows for key in row if key.startswith("gradshare/")
    )
    found: dict[str, dict[str, float]] = {}
    for name in names:
        found[name] = {}
        for kind in ("gradshare", "share"):
            values = [row[f"{kind}/{name}"] for row in rows if f"{kind}/{name}" in row]
            if values:
                found[name][kind] = sum(values) / len(values)
    return found


class _Metrics(Hook):
    found: dict[str, float] | None = None

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.found = {key: float(value) for key, value in (metrics or {}).items()}


def attempt(folder: Path, advance: Advance) -> None:
    """As :func:`run`; whatever ends the run is recorded as its result, so that a sweep goes on. Interrupts are not."""
    try:
        run(folder, advance)
    except BrokenPipeError:
        raise  # nobody listens any more
    except Exception as error:
        traceback.print_exc()
        write_json(folder / RESULT, {"status": "failed", "message": f"{type(error).__name__}: {error}"})


def main(folder: Path) -> int:
    """Exit code: 0 also for a run that failed and has said so in its result; 130 interrupted."""
    # Libraries print; what they print must not get between the lines of the protocol.
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def advance(done: int, total: int) -> None:
        print(json.dumps({"done": done, "total": total}), file=lines, flush=True)

    try:
        attempt(folder, advance)
    except (KeyboardInterrupt, BrokenPipeError):
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
