"""Train and test an mmdet config with compat active, as mmdet's own tools do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .compat import activate

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")


def load_config(config: Path, *, work_dir: Path | None, options: Sequence[str], launcher: str) -> Any:
    """Read a config with ``key=value`` overrides in mmdet's syntax; the work directory defaults to ``work_dirs/NAME``.

    Raises:
        ValueError: an override without ``=``, or an unknown launcher.
    """
    activate()
    from mmengine.config import Config, DictAction

    if launcher not in LAUNCHERS:
        raise ValueError(f"launcher must be one of {list(LAUNCHERS)}, got {launcher!r}")
    parsed = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise ValueError(f"--cfg-options takes key=value, got {option!r}")
        parsed[key] = DictAction._parse_iterable(value)
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(parsed)
    cfg.launcher = launcher
    if work_dir is not None:
        cfg.work_dir = str(work_dir)
    elif not cfg.get("work_dir"):
        cfg.work_dir = str(Path("work_dirs") / config.stem)
    os.environ.setdefault("LOCAL_RANK", "0")
    return cfg


def train(cfg: Any, *, resume: bool = False) -> None:
    """Train ``cfg``; ``resume``: from the work directory's latest checkpoint, or from ``load_from`` where that is set."""
    _runner(cfg, resume=resume).train()


def test(cfg: Any, checkpoint: Path) -> dict[str, Any]:
    """Evaluate ``checkpoint`` with ``cfg``'s test loader and evaluator; returns the metrics."""
    cfg.load_from = str(checkpoint)
    return _runner(cfg, resume=False).test()


def _runner(cfg: Any, *, resume: bool) -> Any:
    from mmdet.registry import RUNNERS
    from mmdet.utils import setup_cache_size_limit_of_dynamo
    from mmengine.runner import Runner

    setup_cache_size_limit_of_dynamo()
    cfg.resume = resume or bool(cfg.get("resume"))
    return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
