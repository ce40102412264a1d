"""Where training is: set by the hook, read by whatever draws keyed numbers."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass


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


class SharedEpoch:
    """An epoch that loader workers see change: shared memory, since persistent workers keep their copy of everything else."""

    def __init__(self) -> None:
        self._value = multiprocessing.Value("q", -1)

    def set(self, epoch: int) -> None:
        with self._value.get_lock():
            self._value.value = int(epoch)

    def require(self, who: str) -> int:
        epoch = int(self._value.value)
        if epoch < 0:
            Progress().require_epoch(who)
        return epoch
