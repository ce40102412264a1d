"""Train and test an mmdet config with compat active, as mmdet's own tools do."""

from __future__ import annotations

import importlib.util
import logging
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compat import activate
from .compat.distributed import leaving_together
from .errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")
BACKEND_PACKAGES = {
    "AimVisBackend": "aim",
    "ClearMLVisBackend": "clearml",
    "DVCLiveVisBackend": "dvclive",
    "MLflowVisBackend": "mlflow",
    "NeptuneVisBackend": "neptune",
    "TensorboardVisBackend": "tensorboard",
    "WandbVisBackend": "wandb",
}
"""What mmengine's visualization back ends import."""


def load_config(config: Path, *, work_dir: Path | None, options: Sequence[str], launcher: str) -> Any:
    """Read a config with ``key=value`` overrides in mmdet's syntax; the work directory defaults to ``work_dirs/NAME``.

    Raises:
        InputError: an override without ``=``, an unknown launcher, or a config with a syntax error.
    """
    activate()
    from mmengine.config import Config, DictAction

    if launcher not in LAUNCHERS:
        raise InputError(f"--launcher must be one of {list(LAUNCHERS)}, got {launcher!r}", usage=True)
    if (
        launcher == "none"
        and "TORCHELASTIC_RUN_ID" in os.environ
        and int(os.environ.get("WORLD_SIZE", 1)) > 1
    ):
        raise InputError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, and --launcher none makes each a run of its own in one work "
            "directory: write --launcher pytorch",
            usage=True,
        )
    parsed = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise InputError(f"--cfg-options takes key=value, got {option!r}", usage=True)
        parsed[key] = DictAction._parse_iterable(value)
    try:
        cfg = Config.fromfile(config)
    except SyntaxError as error:
        raise InputError(_syntax_message(config, error)) from error
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
    check_visualizer(cfg)
    with leaving_together():
        _runner(cfg, resume=resume).train()


def check_visualizer(cfg: Any) -> None:
    """Raise if the visualizer writes to a back end whose package is missing: mmengine itself says so, but not where to change it.

    Raises:
        InputError: the back end, its package, and what to write instead.
    """
    for backend in (cfg.get("visualizer") or {}).get("vis_backends") or []:
        kind = str(backend.get("type")).rpartition(".")[2] if isinstance(backend, Mapping) else ""
        package = BACKEND_PACKAGES.get(kind)
        if package is not None and importlib.util.find_spec(package) is None:
            raise InputError(
                f"visualizer.vis_backends names {kind}, and {package} is not installed; pip install {package}, or write without it: "
                "visualizer = dict(vis_backends=[dict(type='LocalVisBackend')])"
            )


def test(cfg: Any, checkpoint: Path) -> dict[str, Any]:
    """Evaluate ``checkpoint`` with ``cfg``'s test loader and evaluator; returns the metrics.

    Raises:
        InputError: ``checkpoint`` is none, or does not hold every weight of the model (mmengine itself would leave those random).
    """
    from .export import read_checkpoint, student_weights

    weights = student_weights(read_checkpoint(checkpoint))
    cfg.load_from = str(checkpoint)
    with leaving_together():
        runner = _runner(cfg, resume=False)
        _check_fit(runner.model, weights, checkpoint)
        return runner.test()


def _check_fit(model: Any, weights: dict[str, Tensor], checkpoint: Path) -> None:
    from mmengine.model import is_model_wrapper

    model = model.module if is_model_wrapper(model) else model
    own = model.state_dict()
    shapes = [
        f"{key} (checkpoint {list(weights[key].shape)}, model {list(own[key].shape)})"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    missing: list[str] = []
    unexpected: list[str] = []
    if not shapes:
        # Through the model's own loading, which may know older names.
        missing, unexpected = model.load_state_dict(dict(weights), strict=False)
        needed = {name for name, _ in model.named_parameters()}
        missing = [key for key in missing if key in needed or key.endswith(("running_mean", "running_var"))]
    if not shapes and not missing:
        return
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:6])}{', ...' if len(keys) > 6 else ''}"
        for what, keys in (
            ("missing in the checkpoint", missing),
            ("unexpected in the checkpoint", unexpected),
            ("of another shape", shapes),
        )
        if keys
    ]
    raise InputError(
        f"{checkpoint} does not fit the config's {type(model).__name__} ({len(own)} keys): {'; '.join(problems)}. "
        "Check that config and checkpoint belong together"
    )


def _syntax_message(config: Path, error: SyntaxError) -> str:
    # mmengine may raise a second one that has the place in its text only; the first is its context.
    context = error.__context__
    place = error if error.lineno is not None or not isinstance(context, SyntaxError) else context
    if place.lineno is None:
        return f"{config}: syntax error: {error}"
    line = f": {place.text.strip()}" if place.text else ""
    return f"{_file_being_read(error) or config}, line {place.lineno}: syntax error: {place.msg}{line}"


def _file_being_read(error: SyntaxError) -> str | None:
    """The config or ``_base_`` file at fault: mmengine parses text without a name, only its own frames know the file."""
    names = [frame.f_locals.get("filename") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next(
        (os.path.normpath(name) for name in reversed(names) if name and Path(str(name)).is_file()), None
    )


def _runner(cfg: Any, *, resume: bool) -> Any:
    from mmdet.registry import RUNNERS
    from mmdet.utils import setup_cache_size_limit_of_dynamo
    from mmengine.runner import Runner

    setup_cache_size_limit_of_dynamo()
    cfg.resume = resume or bool(cfg.get("resume"))
    with _settings_to_file_only():
        return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)


@contextmanager
def _settings_to_file_only() -> Iterator[None]:
    """Environment and config, hundreds of lines, go to the log file: on a terminal they hide what is wrong with a config."""
    from mmengine.runner import Runner

    original = Runner._log_env

    def log_env(runner: Any, env_cfg: dict[str, Any]) -> None:
        handlers = [h for h in runner.logger.handlers if not isinstance(h, logging.FileHandler)]
        levels = [handler.level for handler in handlers]
        for handler in handlers:
            handler.setLevel(logging.WARNING)
        try:
            original(runner, env_cfg)
        finally:
            for handler, level in zip(handlers, levels, strict=True):
                handler.setLevel(level)

    Runner._log_env = log_env
    try:
        yield
    finally:
        Runner._log_env = original
