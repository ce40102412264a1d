"""Where training is: set by the hook, read by whatever draws keyed numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

_SAMPLE_EPOCH: ContextVar[int | None] = ContextVar("ikd_fast_sample_epoch", default=None)


@dataclass
class Progress:
    """Epoch, step and length of the run; ``epoch`` is None until the hook has set it."""

    epoch: int | None = None
    step: int = 0
    total_steps: int | None = None

    def require_epoch(self, who: str) -> int:
        if self.epoch is None:
            raise RuntimeError(
                f"{who} draws keyed numbers and nobody has told it the epoch; add custom_hooks=[dict(type='IKDHook')] to the config, "
                "or call set_progress(epoch, step) yourself"
            )
        return self.epoch


@contextmanager
def sample_epoch(epoch: int) -> Iterator[None]:
    """Within it every :class:`SharedEpoch` reads ``epoch``: the sample being loaded says itself which pass it is of.

    >>> with sample_epoch(3):
    ...     SharedEpoch().require("a transform")
    3
    """
    token = _SAMPLE_EPOCH.set(int(epoch))
    try:
        yield
    finally:
        _SAMPLE_EPOCH.reset(token)


class SharedEpoch:
    """An epoch that loader workers see change: shared memory, since persistent workers keep their copy of everything else.

    Copies of the transform that holds it (a Config copies what it is given) share it too. Workers load ahead, so in an
    iteration-based loop the next pass's first samples may be loaded before the hook has told it; samples of a
    :class:`~ikd_fast.mmdet.sampler.KeyedSampler` bring their own epoch (:func:`sample_epoch`), and that one counts.
    """

    def __init__(self) -> None:
        # A tensor goes to forked and to spawned workers alike; multiprocessing.Value cannot be copied or pickled.
        self._value = torch.full((1,), -1, dtype=torch.int64).share_memory_()

    def __deepcopy__(self, memo: dict) -> SharedEpoch:
        return self

    def set(self, epoch: int) -> None:
        self._value[0] = int(epoch)

    def require(self, who: str) -> int:
        """The epoch to draw for; raises where nobody has set one, naming ``who`` asked."""
        own = _SAMPLE_EPOCH.get()
        epoch = int(self._value[0]) if own is None else own
        return Progress().require_epoch(who) if epoch < 0 else epoch
