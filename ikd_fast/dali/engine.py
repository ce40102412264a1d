"""Batches through DALI, ahead of the one that is asked for; a file that DALI cannot decode costs its own place only."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .host_sample import HostSample, Skipped
from .pipeline import Inputs, inputs_of

Batch = list[HostSample | Skipped]
Build = Callable[[Callable[[], Inputs], int], Any]


class Engine:
    """Iterates over ``(batch, outputs)``: host samples (and what was skipped of them) with DALI's list of tensors for the samples.

    DALI fails a batch as a whole and the pipeline with it. Then the samples of that batch are decoded one by one, those that
    fail become :class:`Skipped`, and a new pipeline takes the rest and all that was under way: nothing is lost or reordered.

    A batch of which nothing can be used gets one image that can, the last that was, or the next: ranks keep their step.

    Args:
        batches: of the host side; consumed up to ``prefetch`` ahead.
        build: ``build(source, batch_size)`` gives a built pipeline, e.g. of :func:`~ikd_fast.dali.pipeline.image_pipeline`.
        batch_size: the most images of a batch.
    """

    def __init__(self, batches: Iterator[Batch], build: Build, batch_size: int) -> None:
        self._batches, self._build, self._batch_size = batches, build, batch_size
        self._flight: deque[Batch] = deque()
        self._again: deque[Batch] = deque()
        self._last: HostSample | None = None
        self._pipe: Any = None
        self.stand_ins = 0

    def __iter__(self) -> Iterator[tuple[Batch, Any]]:
        try:
            while True:
                found = self._next()
                if found is None:
                    return
                yield found
        finally:
            self.close()

    def close(self) -> None:
        """End DALI's threads and forget what is under way."""
        if self._pipe is not None:
            # The pipeline holds a method of this object, so that neither would go without the collector.
            self._pipe._shutdown()
            self._pipe = None
        self._flight.clear()
        self._again.clear()

    def _next(self) -> tuple[Batch, Any] | None:
        while True:
            if self._pipe is None:
                self._pipe = self._build(self._source, self._batch_size)
                self._pipe.schedule_run()
            try:
                outputs = self._pipe.share_outputs(_stream())
            except StopIteration:
                return None
            except RuntimeError as error:
                self._recover(error)
                continue
            batch = self._flight.popleft()
            good = used(batch)
            self._last = good[-1]
            # With the dynamic executor an output lives as long as somebody holds it.
            self._pipe.release_outputs()
            self._pipe.schedule_run()
            return batch, outputs[0]

    def _source(self) -> Inputs:
        batch = self._again.popleft() if self._again else next(self._batches)
        if not used(batch):
            self.stand_ins += 1
            batch = [*batch, self._stand_in()]
        self._flight.append(batch)
        return inputs_of(used(batch))

    def _stand_in(self) -> HostSample:
        if self._last is not None:
            return self._last
        for batch in self._again:
            if used(batch):
                return used(batch)[0]
        for batch in self._batches:
            self._again.append(batch)
            if used(batch):
                return used(batch)[0]
        raise RuntimeError(
            "none of the images that were asked for could be used; the first lines of the log say why"
        )

    def _recover(self, error: RuntimeError) -> None:
        assert self._pipe is not None
        self._pipe._shutdown()
        self._pipe = None
        waiting, found = deque(self._flight), False
        self._flight.clear()
        checked: deque[Batch] = deque()
        while waiting and not found:
            batch = waiting.popleft()
            after = [item if isinstance(item, Skipped) else self._probed(item) for item in batch]
            found = len(used(after)) < len(used(batch))
            checked.append(after)
        if not found:
            # No file is to blame: DALI's own failure, e.g. memory.
            raise error
        self._again = deque([*checked, *waiting, *self._again])

    def _probed(self, sample: HostSample) -> HostSample | Skipped:
        feed = iter([inputs_of([sample])])
        pipe = self._build(lambda: next(feed), 1)
        try:
            pipe.schedule_run()
            pipe.share_outputs(_stream())
        except RuntimeError as error:
            return Skipped(sample.path, f"DALI cannot decode it: {_reason(error)}")
        finally:
            pipe._shutdown()
        return sample


def used(batch: Batch) -> list[HostSample]:
    """The samples of a batch that were not skipped."""
    return [item for item in batch if isinstance(item, HostSample)]


def to_torch(image: Any) -> Tensor:
    """DALI's tensor as torch's, the same memory."""
    tensor: Tensor = torch.from_dlpack(image)
    return tensor


def _reason(error: RuntimeError) -> str:
    """The line of DALI's message that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    place = next((i for i, line in enumerate(lines) if line.startswith("encountered")), -1)
    told = [
        line
        for line in lines[place + 1 :]
        if not line.startswith(("Stacktrace", "[frame", "Current pipeline"))
    ]
    return told[0] if told else "no reason given"


def _stream() -> Any:
    return torch.cuda.current_stream() if torch.cuda.is_available() and torch.cuda.is_initialized() else None


__all__ = ["Batch", "Engine", "to_torch", "used"]
