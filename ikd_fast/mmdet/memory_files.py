"""A memory of files in a Runner: every rank joins it, checkpoints name it, a resumed run says what it found."""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ikd_fast.attack.memory import PerturbationMemory
from ikd_fast.attack.memory.record import differences
from ikd_fast.attack.memory.shards import DirectoryStore, SharedStore

from mmdet.registry import HOOKS
from mmengine.dist import all_gather_object, broadcast_object_list, get_rank
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

META = "ikd_memory"
LOAD = 0.5
"""Share of an index that is to be filled, for short searches."""


def join(store: DirectoryStore, images: int, work_dir: str) -> None:
    """Open it in every rank, for one run, the first rank alone first. A rank that the system refuses goes on without it.

    Args:
        images: that it is to have room for, where it is new.
        work_dir: of the run; shared memory is found again by it.
    """
    if isinstance(store, SharedStore) and store.name is None:
        store.name = hashlib.blake2b(str(Path(work_dir).resolve()).encode(), digest_size=8).hexdigest()
    name = [store.run]
    broadcast_object_list(name)
    store.run = name[0]
    store.capacity = max(256, 1 << math.ceil(math.log2(max(1, images / store.shards / LOAD))))
    store.say = partial(print_log, logger="current", level=logging.WARNING)
    together(store.join if get_rank() == 0 else _nothing)
    together(store.join)


def together(action: Callable[[], Any]) -> None:
    """Every rank's ``action``; what it raises in one ends all, so that nobody waits for a rank that stopped."""
    problem: Exception | None = None
    try:
        action()
    except Exception as error:
        problem = error
    told = None if problem is None else f"{type(problem).__name__}: {problem}"
    found = all_gather_object(told)
    if problem is not None:
        raise problem
    for rank, other in enumerate(found):
        if other is not None:
            raise RuntimeError(f"rank {rank} cannot use the perturbation memory: {other}")


def _nothing() -> None:
    pass


def settle(store: DirectoryStore) -> None:
    """Between two epochs: write what waits in every rank, so that whichever meets an image next finds its last record."""
    store.flush()
    _tell_others(store, troubles(store))


def troubles(store: DirectoryStore) -> list[Counter[str]]:
    """What each rank counted. Every rank has to ask."""
    return [Counter(counts) for counts in all_gather_object(dict(store.counts))]


def _tell_others(store: DirectoryStore, found: list[Counter[str]]) -> None:
    # The log is rank 0's.
    if get_rank() != 0:
        return
    for rank, counts in list(enumerate(found))[1:]:
        kinds = {kind for kind, count in counts.items() if count} - store.told
        if kinds:
            store.told |= kinds
            told = ", ".join(f"{counts[kind]} records {kind}" for kind in sorted(kinds))
            store.say(f"ikd_fast perturbation memory: rank {rank}: {told}. Training goes on")


def room(store: DirectoryStore) -> int | None:
    """Bytes that may be written where it is; None where the system does not say."""
    try:
        return shutil.disk_usage(store.directory).free
    except OSError:
        return None


def store_of(memory: PerturbationMemory | None) -> DirectoryStore | None:
    """The files of a memory that has any."""
    return memory.store if memory is not None and isinstance(memory.store, DirectoryStore) else None


@HOOKS.register_module()
class MemoryHook(Hook):
    """Has every rank write what waits before a checkpoint is saved, and names the memory in its meta: ``directory``, ``settings``,
    ``step``.

    A run that is resumed compares the settings, and says how many records are newer than its checkpoint: of a run that was killed.
    They are perturbations all the same, and are used.

    Importing ``ikd_fast.mmdet`` adds it to every Runner; it does nothing without a memory of files.
    """

    priority = "VERY_HIGH"
    _loaded: dict[str, Any] | None = None

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        if any(_saves(hook, runner) for hook in runner.hooks):
            self._write(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        self._write(runner)

    def _write(self, runner: Runner) -> None:
        # Only the first rank saves, and asks its hooks; the records are all ranks'.
        store = self._store(runner)
        if store is not None:
            together(store.flush)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        store = self._store(runner)
        if store is None or not store.is_open:
            return
        store.flush()
        checkpoint["meta"][META] = {
            "directory": str(store.directory),
            "settings": dict(store.settings or {}),
            "step": runner.iter,
        }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._loaded = checkpoint.get("meta", {}).get(META)

    def before_train(self, runner: Runner) -> None:
        store = self._store(runner)
        if store is None or not store.is_open or not getattr(runner, "_resume", False):
            return
        print_log(f"ikd_fast {self._found(store, runner.iter)}", logger="current", level=logging.INFO)

    def after_train(self, runner: Runner) -> None:
        store = self._store(runner)
        if store is not None and store.is_open:
            store.sync()
            store.close()

    def _found(self, store: DirectoryStore, step: int) -> str:
        records = [record.step for record in store.records()]
        ahead = sum(at >= step for at in records)
        text = f"perturbation memory: {store.directory} has {len(records)} records"
        if ahead:
            text += f", {ahead} of them of steps after the checkpoint's {step}: valid perturbations, and used"
        if self._loaded is None:
            return text + "; the checkpoint names no memory"
        if Path(self._loaded["directory"]).resolve() != store.directory.resolve():
            text += f"; the checkpoint's memory was {self._loaded['directory']}"
        differ = differences(self._loaded["settings"], dict(store.settings or {}))
        if differ:
            text += f"; it was made with other settings than the checkpoint's ({'; '.join(differ)})"
        return text

    def _store(self, runner: Runner) -> DirectoryStore | None:
        from .hooks import _model
        from .memory import memory_of

        return store_of(memory_of(_model(runner)))


def _saves(hook: Hook, runner: Runner) -> bool:
    """Whether it will save a checkpoint after this iteration."""
    if not isinstance(hook, CheckpointHook) or hook.by_epoch:
        return False
    last = hook.save_last and hook.is_last_train_iter(runner)
    return bool(last or hook.every_n_train_iters(runner, hook.interval, hook.save_begin))
