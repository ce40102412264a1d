"""A hook that keeps the loader's position in checkpoints and goes on from there."""

from __future__ import annotations

import functools
import logging
from typing import Any

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator

from .sampler import KeyedBatches, keyed_batches

POSITION = "ikd_sampler"


@HOOKS.register_module()
class KeyedResumeHook(Hook):
    """Resumes a run with a :class:`~ikd_fast.mmdet.KeyedSampler` at the next image, and does nothing for other samplers.

    Importing ``ikd_fast.mmdet`` adds it to every Runner. Checkpoints get ``ikd_sampler``: seed, number of images, ranks and
    batch size, and the iterations done in this epoch (of the whole run, for ``IterBasedTrainLoop``).
    """

    priority = "VERY_HIGH"
    _loaded: dict | None = None
    _skipped = 0
    _first = 0

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._loaded = checkpoint.get(POSITION)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        loop: Any = runner._train_loop  # the public name would build one
        batches = keyed_batches(getattr(loop, "dataloader", None))
        if batches is None:
            return
        meta = checkpoint["meta"]
        if isinstance(loop, IterBasedTrainLoop):
            done = meta["iter"]
        else:
            # At an epoch's end mmengine writes the next epoch's number.
            done = meta["iter"] - self._first if meta["epoch"] == runner.epoch else 0
        checkpoint[POSITION] = {**describe(batches, loop), "batches": done}

    def before_train(self, runner: Runner) -> None:
        batches = keyed_batches(runner.train_dataloader)
        if batches is None:
            return
        by_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop)
        if by_epoch and batches.sampler.infinite:
            raise ValueError(
                "KeyedSampler(infinite=True) never ends an epoch, and this train loop waits for that: write "
                "sampler=dict(type='KeyedSampler'), or train_cfg=dict(type='IterBasedTrainLoop', max_iters=...)"
            )
        if runner.iter == 0:
            return
        done = position(self._loaded, batches, runner)
        if by_epoch:
            batches.start_at(runner.epoch, done)
            self._skipped = done
        else:
            self._advance(runner.train_loop, batches, done)

    def before_train_epoch(self, runner: Runner) -> None:
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            return
        self._first = runner.iter - self._skipped
        if self._skipped:
            # The loop counts batches of an epoch from 0; log lines and hooks are to see those of the whole epoch.
            loop: Any = runner.train_loop
            loop.run_iter = functools.partial(_run_iter_from, loop, self._skipped)

    def after_train_epoch(self, runner: Runner) -> None:
        if self._skipped:
            del runner.train_loop.__dict__["run_iter"]
            self._skipped = 0

    def _advance(self, loop: Any, batches: KeyedBatches, done: int) -> None:
        passes, inner = (0, done) if batches.sampler.infinite else divmod(done, len(batches))
        batches.start_at(passes, inner)
        # The one there is has its workers loading from the run's beginning.
        loop.dataloader_iterator = None
        loop.dataloader_iterator = _Advanced(loop.dataloader, passes, done)


class _Advanced(_InfiniteDataloaderIterator):
    """Starts where the batches do; the loop's own advance of ``done`` steps, which would load every image, moves nothing."""

    def __init__(self, dataloader: Any, passes: int, done: int) -> None:
        super().__init__(dataloader)
        self._epoch, self._idle = passes, done

    def __next__(self) -> Any:
        if self._idle:
            self._idle -= 1
            return None
        return super().__next__()


def _run_iter_from(loop: Any, first: int, idx: int, data_batch: Any) -> None:
    type(loop).run_iter(loop, first + idx, data_batch)


def describe(batches: KeyedBatches, loop: Any) -> dict[str, Any]:
    """What the order and the batches depend on."""
    sampler = batches.sampler
    return dict(
        by_epoch=not isinstance(loop, IterBasedTrainLoop),
        seed=sampler.seed,
        images=len(sampler.dataset),
        shuffle=sampler.shuffle,
        infinite=sampler.infinite,
        slots=sampler.slots,
        world_size=sampler.world_size,
        batch_size=batches.batch_size,
    )


def position(saved: dict | None, batches: KeyedBatches, runner: Runner) -> int:
    """Batches of this epoch that the checkpoint's run has done; the sampler takes over its seed.

    Raises:
        ValueError: the checkpoint has no position, or one that means nothing to this data set or batch size.
    """
    if saved is None:
        if not isinstance(runner.train_loop, IterBasedTrainLoop) and runner.iter == runner.epoch * len(
            batches
        ):
            return 0
        raise ValueError(
            f"the checkpoint (iteration {runner.iter}) was saved by a run without KeyedSampler, so the images it has seen of this epoch "
            "are not known; resume with the sampler it was trained with, or from a checkpoint of an epoch's end"
        )
    done, now = saved["batches"], describe(batches, runner.train_loop)
    if saved["seed"] != now["seed"]:
        print_log(
            f"KeyedSampler: the checkpoint's seed {saved['seed']} goes on, not {now['seed']}",
            logger="current",
            level=logging.WARNING,
        )
        batches.sampler.seed = saved["seed"]
    if done == 0:
        return 0

    def changed(*names: str) -> list[str]:
        # Checkpoints of before there were slots do not name them.
        return [
            f"{name} {saved.get(name)}, now {now[name]}" for name in names if saved.get(name) != now[name]
        ]

    differs, ranks = (
        changed("images", "shuffle", "infinite", "slots", "by_epoch"),
        changed("world_size", "batch_size"),
    )
    same_images = saved["world_size"] * saved["batch_size"] == now["world_size"] * now["batch_size"]
    if differs or (ranks and not (same_images and batches.plain)):
        raise ValueError(
            f"the checkpoint was saved after {done} iterations of an epoch, with {'; '.join(differs + ranks)}: the next image is not "
            "defined. Resume with the same data set and the same ranks x batch size (with a batch_sampler that groups images: "
            "the same ranks), or from a checkpoint of an epoch's end"
        )
    return done
