"""Hooks: one tells keyed parts the epoch, one keeps the losses' weights out of the student's state dict."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from mmdet.registry import HOOKS
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import IterBasedTrainLoop, Runner

from . import memory
from .augment import AdaptiveFreqAugBatch
from .banner import log_banner
from .classes import check_training
from .dali.build import build_dali_loader, is_dali
from .memory_files import MemoryHook
from .offline.told import log_sets
from .pipeline_checks import check_pipeline
from .resume import KeyedResumeHook
from .sampler import attach
from .state import check_any_fits

KD_STATE = "kd_state_dict"
OURS = tuple(f"train/{name}/" for name in ("loss_kd", "kd", "share", "gradshare", "aug", "attack"))
CALIBRATED = "train/gradshare/"


@HOOKS.register_module()
class IKDHook(Hook):
    """Sets epoch and step on every part with ``set_progress`` or ``set_epoch`` (model, data preprocessor, batch augments,
    pipeline transforms), and gives the losses their weights back when a checkpoint is loaded.

    Importing ``ikd_fast.mmdet`` adds it to every Runner; a config may also name it.
    """

    priority = "VERY_HIGH"
    _branch_is_over = False

    def before_train(self, runner: Runner) -> None:
        model = _model(runner)
        self._parts = [m for m in model.modules() if hasattr(m, "set_progress")]
        self._transforms = list(_transforms(runner.train_dataloader.dataset))
        self._pass = _iterations_per_pass(runner)
        inside = getattr(getattr(model, "data_preprocessor", None), "augment", None) is not None
        inside |= any(isinstance(m, AdaptiveFreqAugBatch) for m in model.modules())
        if inside and any(type(t).__name__ == "AdaptiveFreqAugTransform" for t in self._transforms):
            raise ValueError(
                "AdaptiveFreqAug is in the loader's pipeline and in the model (augment=... or batch_augments): images would be augmented "
                "twice; remove one of them"
            )
        for part in self._parts:
            if hasattr(part, "set_total_steps"):
                part.set_total_steps(runner.max_iters)
        self._announce(runner, runner.iter)
        if getattr(model, "keeps_kd_state", False):
            check_pipeline(runner.train_dataloader.dataset, model.ikd.attack)
            log_sets(runner.train_dataloader.dataset, model)
            check_training(model, runner.train_dataloader.dataset)
            memory.start(runner, model)
            log_banner(runner, model, float(self._pass))
        self._branch_is_over = False

    def after_train(self, runner: Runner) -> None:
        if not self._branch_is_over:
            memory.finish(_model(runner))

    def before_train_epoch(self, runner: Runner) -> None:
        self._announce(runner, runner.iter)
        self._settle(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        for part in self._parts:
            part.set_progress(self._epoch(runner, runner.iter), runner.iter)
        model = _model(runner)
        if not self._branch_is_over and getattr(model, "keeps_kd_state", False) and not model.is_active():
            self._branch_is_over = True
            memory.finish(model, release=True)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        if getattr(_model(runner), "keeps_kd_state", False) and outputs is not None:
            # mmengine goes on logging the last value of a key that is not given any more, as those of a branch that is over.
            scalars = runner.message_hub.log_scalars
            # In a step without attacked images (`fraction`) they go on.
            over = OURS if not _model(runner).is_active() else CALIBRATED
            for key in [k for k in scalars if k.startswith(over) and k.removeprefix("train/") not in outputs]:
                del scalars[key]
        # An iteration-based loop has one "epoch": the loader follows the sampler's passes. The next batch is read next; with
        # loader workers, samples prefetched across the border of a pass have the last one's key, unless a KeyedSampler gave theirs.
        if not _by_epoch(runner) and self._epoch(runner, runner.iter + 1) != self._told:
            self._announce(runner, runner.iter + 1)
            self._settle(runner)

    def _settle(self, runner: Runner) -> None:
        model = _model(runner)
        if getattr(model, "keeps_kd_state", False) and not self._branch_is_over:
            memory.between_epochs(model)

    def _epoch(self, runner: Runner, iteration: int) -> int:
        """The sampler's pass: the loop's epoch, or images seen over images there are."""
        return runner.epoch if _by_epoch(runner) else iteration // self._pass

    def _announce(self, runner: Runner, iteration: int) -> None:
        self._told = self._epoch(runner, iteration)
        for part in self._parts:
            part.set_progress(self._told, runner.iter)
        for transform in self._transforms:
            transform.set_epoch(self._told)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = _model(runner)
        if not getattr(model, "keeps_kd_state", False):
            check_any_fits(model, checkpoint.get("state_dict", checkpoint))
            return
        kd = checkpoint.get(KD_STATE, {})
        lacking = sorted(k for k in model.state_dict() if k.startswith("kd.") and k not in kd)
        if runner._resume and lacking:
            raise ValueError(
                f"the checkpoint to resume from lacks {len(lacking)} weights of the losses, e.g. {lacking[:3]}: it is of another "
                "run; write load_from=... without resume to start from its student"
            )
        checkpoint.get("state_dict", checkpoint).update(kd)


@HOOKS.register_module()
class IKDCheckpointHook(Hook):
    """Moves the losses' weights out of ``state_dict`` when everybody else (an EMA, say) has written theirs."""

    priority = "LOWEST"

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if getattr(_model(runner), "keeps_kd_state", False):
            state = checkpoint["state_dict"]
            checkpoint[KD_STATE] = {key: state.pop(key) for key in [k for k in state if k.startswith("kd.")]}


def _model(runner: Runner) -> Any:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _by_epoch(runner: Runner) -> bool:
    return not isinstance(runner.train_loop, IterBasedTrainLoop)


def _iterations_per_pass(runner: Runner) -> Fraction:
    """Iterations in which all ranks together have seen each image once: not a whole number where passes have no border."""
    loader = runner.train_dataloader
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if not isinstance(sampler, InfiniteSampler) and not getattr(sampler, "infinite", False):
        return Fraction(max(1, len(loader)))
    batch = getattr(loader.batch_sampler, "batch_size", loader.batch_size)
    places = getattr(sampler, "pass_length", len(loader.dataset))
    return Fraction(places, batch * get_world_size())


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
        inner = getattr(inner, "transforms", inner)
        if isinstance(inner, (list, tuple)):
            yield from _nested(inner)


def install() -> None:
    """Make every Runner carry the hooks and every loader it builds start at epoch 0.

    mmengine has no way for a model to bring its hook along, and an iteration-based loop starts loader workers before any
    hook is called.
    """
    if getattr(Runner.register_hooks, "_ikd_fast", False):
        return
    register, build = Runner.register_hooks, Runner.build_dataloader

    def register_hooks(self: Runner, default_hooks: Any = None, custom_hooks: Any = None) -> None:
        register(self, default_hooks, custom_hooks)
        for kind in (IKDHook, IKDCheckpointHook, KeyedResumeHook, MemoryHook):
            if not any(isinstance(hook, kind) for hook in self.hooks):
                self.register_hook(kind())

    def build_dataloader(dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        if is_dali(dataloader):
            loader = build_dali_loader(
                build, dataloader, **dict(zip(("seed", "diff_rank_seed"), args, strict=False)), **kwargs
            )
        else:
            loader = build(dataloader, *args, **kwargs)
        for transform in _transforms(loader.dataset):
            transform.set_epoch(0)
        return attach(loader)

    register_hooks._ikd_fast = True  # type: ignore[attr-defined]
    Runner.register_hooks = register_hooks
    Runner.build_dataloader = staticmethod(build_dataloader)
