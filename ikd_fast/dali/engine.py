"""Batches through DALI, ahead of the one that is asked for; a file that DALI cannot decode costs its own place only."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .header import plain_png
from .host_sample import HostSample, Skipped
from .steps import WRONG_SIZE

Batch = list[HostSample | Skipped]
Build = Callable[[Callable[[], list[HostSample]], int], Any]
LOOK_AHEAD = 100
"""Batches that are looked through for one image that can be used."""


class Engine:
    """Iterates over ``(batch, outputs)``: host samples (and what was skipped of them) with DALI's list of tensors for the samples.

    DALI fails a batch as a whole and the pipeline with it. Then the samples of that batch are decoded one by one, those that
    fail become :class:`Skipped`, and a new pipeline takes the rest and all that was under way: nothing is lost or reordered.

    A batch of which nothing can be used gets a copy of the first image that can, of this iteration: ranks keep their step.

    Args:
        batches: of the host side; consumed up to ``prefetch`` ahead.
        build: ``build(source, batch_size)`` gives a built pipeline, e.g. of :func:`~ikd_fast.dali.pipeline.image_pipeline`.
        batch_size: the most images of a batch.
        strict: the first batch of which something was skipped comes without outputs (None) and is the last one.

    What the host side raises comes after the batches that were fetched before it.

    Raises:
        RuntimeError: no image can be used; names the first. A failure of DALI that no file is to blame for: an image of our own, or
            one that could be used before, fails as well.
    """

    def __init__(
        self, batches: Iterator[Batch], build: Build, batch_size: int, *, strict: bool = False
    ) -> None:
        self._batches, self._build, self._batch_size, self._strict = batches, build, batch_size, strict
        self._flight: deque[Batch] = deque()
        self._again: deque[Batch] = deque()
        self._broken: Batch | None = None
        self._error: Exception | None = None
        self._spare: HostSample | None = None
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
            self._pipe._shutdown()
            self._pipe = None
        # Pipelines hold a method of this object and go with the collector only. A loader's iterator must not: collected, it waits
        # five seconds for each of its workers.
        self._batches = iter(())
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
                if self._error is not None:
                    raise self._error from None
                broken, self._broken = self._broken, None
                return None if broken is None else (broken, None)
            except RuntimeError as error:
                self._recover(error)
                continue
            batch = self._flight.popleft()
            if self._spare is None and not self._strict:
                self._spare = _copied(used(batch)[0])
            # With the dynamic executor an output lives as long as somebody holds it.
            self._pipe.release_outputs()
            self._pipe.schedule_run()
            return batch, outputs[0]

    def _source(self) -> list[HostSample]:
        try:
            return self._fetch()
        except StopIteration:
            raise
        except Exception as error:  # not through DALI, which would lose the batches that are under way
            self._error = error
            raise StopIteration from None

    def _fetch(self) -> list[HostSample]:
        batch = self._again.popleft() if self._again else next(self._batches)
        if self._strict and len(used(batch)) < len(batch):
            self._broken = batch
            raise StopIteration
        if not used(batch):
            batch = [*batch, self._stand_in(batch)]
            self.stand_ins += 1
        self._flight.append(batch)
        return used(batch)

    def _stand_in(self, lacking: Batch) -> HostSample:
        if self._spare is not None:
            return _copied(self._spare)
        # What DALI has not decoded yet may be as bad, and would fail this batch again and again.
        for sample in (sample for batch in self._flight for sample in used(batch)):
            found = self._probed(sample)
            if isinstance(found, HostSample):
                return _copied(found)
        for batch in self._ahead():
            for i, item in enumerate(batch):
                batch[i] = found = item if isinstance(item, Skipped) else self._probed(item)
                if isinstance(found, HostSample):
                    return _copied(found)
        first = next(item for item in lacking if isinstance(item, Skipped))
        raise RuntimeError(
            f"none of the images that were asked for could be used; the first is {first.path}: {first.reason}"
        )

    def _ahead(self) -> Iterator[Batch]:
        """The batches after this one; those that are fetched for it are kept."""
        yield from tuple(self._again)
        for batch in itertools.islice(self._batches, LOOK_AHEAD):
            self._again.append(batch)
            yield batch

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
            # What stands in for others could be used before.
            if sum(s.stand_in for s in used(after)) < sum(s.stand_in for s in used(batch)):
                raise error
            checked.append(after)
        if not found or isinstance(self._probed(control()), Skipped):
            # No file is to blame: DALI's own failure, or cv2's, e.g. for memory.
            raise error
        self._again = deque([*checked, *waiting, *self._again])

    def _probed(self, sample: HostSample) -> HostSample | Skipped:
        feed = iter([[sample]])
        pipe = self._build(lambda: next(feed), 1)
        try:
            pipe.schedule_run()
            pipe.share_outputs(_stream())
        except RuntimeError as error:
            reason = _reason(error)
            if WRONG_SIZE in reason:
                return Skipped(sample.path, reason[reason.index(WRONG_SIZE) :])
            return Skipped(sample.path, f"DALI cannot decode it ({reason})")
        finally:
            pipe._shutdown()
        return sample


def used(batch: Batch) -> list[HostSample]:
    """The samples of a batch that were not skipped."""
    return [item for item in batch if isinstance(item, HostSample)]


def _copied(sample: HostSample) -> HostSample:
    """To stand in for others, with targets of its own: those that were given away may have been changed."""
    return replace(sample, payload=copy.deepcopy(sample.payload), stand_in=True)


def control() -> HostSample:
    """An image that every decoder takes."""
    return HostSample("an image of ikd_fast's own", np.frombuffer(plain_png(8, 8), np.uint8), (8, 8))


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
    return told[0].rstrip(" :") if told else "no reason given"


def _stream() -> Any:
    return torch.cuda.current_stream() if torch.cuda.is_available() and torch.cuda.is_initialized() else None


__all__ = ["Batch", "Engine", "to_torch", "used"]
