"""The one hook: tells keyed parts the epoch, and keeps distillation weights out of the student's state dict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

KD_STATE = "kd_state_dict"


@HOOKS.register_module()
class IKDHook(Hook):
    """Sets epoch and step on every part with ``set_progress`` or ``set_epoch`` (model, data preprocessor, batch augments,
    pipeline transforms), and stores loss modules under ``kd_state_dict`` so that ``state_dict`` is a plain student's.

    Importing ``ikd_fast.mmdet`` adds it to every Runner; a config may also name it.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner: Runner) -> None:
        self._parts = [m for m in _model(runner).modules() if hasattr(m, "set_progress")]
        self._transforms = list(_transforms(runner.train_dataloader.dataset))
        for part in self._parts:
            if hasattr(part, "set_total_steps"):
                part.set_total_steps(runner.max_iters)
        self._announce(runner)

    def before_train_epoch(self, runner: Runner) -> None:
        self._announce(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        for part in self._parts:
            part.set_progress(_epoch(runner), runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        # An iteration-based loop has one "epoch": loader transforms follow the sampler's passes.
        if _epoch(runner) != self._told:
            self._announce(runner)

    def _announce(self, runner: Runner) -> None:
        self._told = _epoch(runner)
        for part in self._parts:
            part.set_progress(self._told, runner.iter)
        for transform in self._transforms:
            transform.set_epoch(self._told)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        state = checkpoint["state_dict"]
        kd = {key: state.pop(key) for key in [k for k in state if k.startswith("kd.")]}
        if kd:
            checkpoint[KD_STATE] = kd

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if getattr(_model(runner), "keeps_kd_state", False):
            checkpoint.get("state_dict", checkpoint).update(checkpoint.get(KD_STATE, {}))


def _model(runner: Runner) -> Any:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _epoch(runner: Runner) -> int:
    """The sampler's pass: the loop's epoch, or images seen over images there are."""
    if (
        getattr(runner.train_loop, "_by_epoch", True)
        and runner.max_epochs
        and type(runner.train_loop).__name__ != "IterBasedTrainLoop"
    ):
        return runner.epoch
    return runner.iter // max(1, len(runner.train_dataloader))


def _transforms(dataset: Any) -> Iterator[Any]:
    """Every transform with ``set_epoch`` below a data set, whatever wraps it."""
    for name in ("dataset", "datasets"):
        inner = getattr(dataset, name, None)
        for child in inner if isinstance(inner, (list, tuple)) else [inner] if inner is not None else []:
            yield from _transforms(child)
    pipeline = getattr(dataset, "pipeline", None)
    yield from _nested(getattr(pipeline, "transforms", pipeline if isinstance(pipeline, list) else []))


def _nested(transforms: Any) -> Iterator[Any]:
    for transform in transforms:
        if hasattr(transform, "set_epoch"):
            yield transform
        inner = getattr(transform, "transforms", None)
        if isinstance(inner, (list, tuple)):
            yield from _nested(inner)


def install() -> None:
    """Make every Runner carry an :class:`IKDHook` (mmengine has no way for a model to bring its hook along)."""
    if getattr(Runner.register_hooks, "_ikd_fast", False):
        return
    original = Runner.register_hooks

    def register_hooks(self, default_hooks=None, custom_hooks=None):
        original(self, default_hooks, custom_hooks)
        if not any(isinstance(hook, IKDHook) for hook in self.hooks):
            self.register_hook(IKDHook())

    register_hooks._ikd_fast = True  # type: ignore[attr-defined]
    Runner.register_hooks = register_hooks
