"""torch's ``DataLoader`` for the host's part, DALI for the pixels."""

from __future__ import annotations

import atexit
import difflib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from inspect import signature
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader

from .cv2_pixels import Cv2Pixels
from .engine import Batch, Engine, used
from .errors import BadImage
from .host_sample import HostSample, Skipped
from .pipeline import ORDERS, Finish, image_pipeline
from .require import require_dali

logger = logging.getLogger("ikd_fast")
DEVICES, ON_ERROR, RESIZERS = ("cpu", "gpu"), ("raise", "skip"), ("cv2", "dali")
TOLD = 20
"""Skipped files that are named in the log; the others are counted."""

Collate = Callable[[list[HostSample], Any], Any]


_OPEN: WeakSet[HostLoader] = WeakSet()
_KEPT: list[Any] = []


def _keep_workers() -> None:
    """From the collector, until torch knows that Python ends: then it no longer waits for workers, which end with their parent."""
    _KEPT.extend(loader._iterator for loader in _OPEN)


@dataclass
class Skips:
    """Images that could not be used, over the life of a loader."""

    count: int = 0
    stand_ins: int = 0
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, item: Skipped) -> None:
        self.count += 1
        if item.path in self.reasons:
            return
        self.reasons[item.path] = item.reason
        if len(self.reasons) <= TOLD:
            logger.warning("ikd_fast DALIDetLoader leaves out %s: %s", item.path, item.reason)

    def __str__(self) -> str:
        if not self.count:
            return "no file was left out"
        text = f"{self.count} times one of {len(self.reasons)} files that cannot be used was left out"
        if self.stand_ins:
            text += f"; {self.stand_ins} batches had nothing else and got another image"
        return text


class HostLoader(DataLoader):
    """A ``DataLoader`` whose batches of :class:`~ikd_fast.dali.host_sample.HostSample` go through DALI.

    Args:
        dataset: its ``__getitems__`` gives host samples, or :class:`~ikd_fast.dali.host_sample.Skipped`.
        collate: from samples and DALI's outputs to a batch.
        device: ``"gpu"`` (decoding by nvJPEG, images stay there) or ``"cpu"``. None: ``"gpu"`` where torch sees one.
        device_id: of the GPU; None for torch's current one.
        threads: DALI's CPU threads, and as many of cv2.
        prefetch: batches that DALI works ahead.
        on_error: ``"raise"`` or ``"skip"`` images that cannot be read or decoded.
        channel_order: ``"bgr"`` or ``"rgb"``.
        resizer: who resizes, crops and mirrors: ``"cv2"`` (on a CPU; the pixels of mmdet's transforms to the bit) or ``"dali"``. None:
            ``"cv2"`` on a CPU, where DALI's resize takes about ten times as long, ``"dali"`` on a GPU.
        gain: whether samples scale their grey levels, which takes one more pass.
        finish: let DALI's own operators mirror, add noise, normalise and pad.
        kwargs: of ``torch.utils.data.DataLoader``; ``num_workers`` processes do the host's part (files, annotations).

    Attributes:
        skips: :class:`Skips` so far.

    Raises:
        ImportError: DALI, or cv2 for ``resizer="cv2"``, is not installed; names the package.
        ValueError: an unknown choice, a GPU asked for where there is none, cv2 on a GPU, numbers below 1.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Collate,
        *,
        device: str | None = None,
        device_id: int | None = None,
        threads: int = 2,
        prefetch: int = 2,
        on_error: str = "raise",
        channel_order: str = "bgr",
        resizer: str | None = None,
        gain: bool = False,
        finish: Finish | None = None,
        **kwargs: Any,
    ) -> None:
        _check_names(kwargs)
        require_dali()
        self.device, self.device_id = _device(device, device_id)
        if resizer is None:
            resizer = "cv2" if self.device == "cpu" else "dali"
        for name, value, valid in (
            ("on_error", on_error, ON_ERROR),
            ("channel_order", channel_order, ORDERS),
            ("resizer", resizer, RESIZERS),
        ):
            if value not in valid:
                raise ValueError(
                    f"DALIDetLoader: {name} must be one of {', '.join(map(repr, valid))}, got {value!r}"
                )
        if resizer == "cv2" and self.device == "gpu":
            raise ValueError(
                "DALIDetLoader: resizer='cv2' works on a CPU's images, with device='cpu'; on a GPU expected 'dali'"
            )
        for name, number in (("threads", threads), ("prefetch", prefetch)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"DALIDetLoader: {name} must be a whole number >= 1, got {number!r}")
        if "collate_fn" in kwargs:
            raise ValueError("DALIDetLoader makes its batches itself: leave collate_fn out")
        self.threads, self.ahead = threads, prefetch
        self.on_error, self.channel_order, self.collate = on_error, channel_order, collate
        self.gain, self.finish, self.resizer = gain, finish, resizer
        if resizer == "cv2":
            Cv2Pixels(1)  # whether it is there
        self.skips = Skips()
        super().__init__(dataset, collate_fn=list, **kwargs)
        if not _OPEN:
            # Run before DALI's own, which was registered before and calls the collector.
            atexit.unregister(_keep_workers)
            atexit.register(_keep_workers)
        _OPEN.add(self)

    def close(self) -> None:
        """End the workers that ``persistent_workers`` keeps. The loader can be iterated again, with new ones."""
        iterator: Any = self._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            self._iterator = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # At once, not at the first batch: a sampler's epoch is that of this moment.
        return self._through_dali(super().__iter__())

    def _through_dali(self, batches: Iterator[Batch]) -> Iterator[Any]:
        cv2 = Cv2Pixels(self.threads) if self.resizer == "cv2" else None
        engine = Engine(batches, self._builder(cv2), self._largest_batch(), strict=self.on_error == "raise")
        before = self.skips.count
        try:
            for batch, outputs in engine:
                self._account(batch)
                yield self.collate(used(batch), outputs)
        finally:
            engine.close()
            if cv2 is not None:
                cv2.close()
            self.skips.stand_ins += engine.stand_ins
            if self.skips.count > before:
                logger.warning("ikd_fast DALIDetLoader: %s", self.skips)

    def _builder(self, cv2: Cv2Pixels | None) -> Callable[[Callable[[], Any], int], Any]:
        # It does not hold this loader: DALI's pipelines are freed by the collector, at a moment when it would wait five seconds for
        # each of a loader's persistent workers.
        settings: dict[str, Any] = dict(
            threads=self.threads,
            device_id=self.device_id,
            prefetch=self.ahead,
            channel_order=self.channel_order,
            gain=self.gain,
            cv2=cv2,
            finish=self.finish,
        )
        return lambda source, batch_size: image_pipeline(source, batch_size=batch_size, **settings)

    def _largest_batch(self) -> int:
        size = self.batch_size or getattr(self.batch_sampler, "batch_size", None)
        if not size:
            raise ValueError(
                f"DALIDetLoader: {type(self.batch_sampler).__name__} does not say its batch_size, and DALI has to know "
                "the largest: give the batch_sampler an attribute batch_size, or the loader a batch_size"
            )
        return int(size)

    def _account(self, batch: Batch) -> None:
        for item in batch:
            if isinstance(item, Skipped):
                if self.on_error == "raise":
                    raise BadImage(
                        item.path,
                        f"{item.reason}. on_error='skip' leaves such files out and counts them",
                    )
                self.skips.add(item)


def _check_names(settings: Iterable[str]) -> None:
    theirs = set(signature(DataLoader.__init__).parameters)
    for name in settings:
        if name not in theirs:
            ours = set(signature(HostLoader.__init__).parameters) | {
                "mean",
                "std",
                "divisor",
                "dtype",
                "pixels",
                "output",
            }
            near = difflib.get_close_matches(name, ours | theirs, n=1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            raise TypeError(
                f"DALIDetLoader has no setting {name!r} here; it has those of its documentation and of torch's DataLoader{hint}"
            )


def _device(device: str | None, device_id: int | None) -> tuple[str, int | None]:
    if device not in (None, *DEVICES):
        hint = " (torch's 'cuda' is DALI's 'gpu')" if str(device).startswith("cuda") else ""
        raise ValueError(f"DALIDetLoader: device must be 'cpu', 'gpu' or None, got {device!r}{hint}")
    if device == "gpu" and not torch.cuda.is_available():
        raise ValueError(
            "DALIDetLoader(device='gpu'): torch sees no CUDA device; write device='cpu', or None to take what there is"
        )
    if device is None:
        device = "gpu" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        if device_id is not None:
            raise ValueError(
                f"DALIDetLoader: device_id is of a GPU, got {device_id!r} for a CPU; leave it out"
            )
        return device, None
    return device, torch.cuda.current_device() if device_id is None else int(device_id)
