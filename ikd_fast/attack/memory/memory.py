"""The perturbations of a data set, kept from visit to visit."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ikd_fast.kernels.reference.delta_codes import DeltaCodes

from .forecast import BITS, STRIDES, Forecast, forecast, human
from .record import MemorySettings, Record, differences
from .room import available_bytes
from .seed import Seed
from .shards import DirectoryStore, SharedStore
from .shards.layout import Unreadable
from .store import HostStore, Store
from .view import View

FORGOTTEN_VIEWS = 16
"""So many changed sizes, and no more hits than that, are no accident."""
RESOLUTIONS = ("auto", "network", "original")


class PerturbationMemory:
    """Packed perturbations by image id, in canonical coordinates.

    Each image has one :class:`Record`: its perturbation on the *canonical* image, which every view of it (flip, crop, resize)
    reads and updates by a :class:`View`. Canonical is the image after the loader's resize (``"network"``, for pipelines that resize
    every image by one fixed rule) or the image of the file (``"original"``); a memory itself only sees sizes.

    The host store belongs to one process: it starts empty, also in a run that is resumed, and each rank of a distributed run has
    its own. There an image is met cold once per rank that meets it, unless a sampler keeps image -> rank fixed.

    Args:
        bits: 8, 4 or 2 per value. 4 hold the nine levels of eps 8, step 2 exactly.
        stride: 1 or 2: one value for stride x stride canonical pixels.
        resolution: ``"network"``, ``"original"``, or ``"auto"``: network where the pipeline allows it, else original.
        store: where records are kept; default :class:`HostStore`.
        max_bytes: a limit below that of the machine. Records beyond it raise ``MemoryError``.
        seed_from: folder of ``ikd-fast attack ... --packed``: an image that the memory does not know starts from there, if it is there.

    >>> memory = PerturbationMemory(bits=4)
    >>> codes = memory.bind(MemorySettings(eps=8, step=2))
    >>> view = View.identity((4, 5))
    >>> memory.fetch([7], [view], "cpu")
    [None]
    >>> start = codes.start((3, 4, 5), seed=0, id=7, epoch=0, device="cpu")
    >>> memory.put(7, Record(size=(4, 5), visits=1, step=0, delta=start))
    >>> bool((memory.fetch([7], [view], "cpu")[0].delta == start).all())
    True
    >>> memory.counters["hits"], memory.counters["unknown"], memory.counters["bytes"]
    (1, 1, 36)
    """

    def __init__(
        self,
        bits: int = 4,
        stride: int = 1,
        *,
        resolution: str = "auto",
        store: Store | None = None,
        max_bytes: int | None = None,
        seed_from: str | os.PathLike[str] | None = None,
    ) -> None:
        for name, value, valid in (
            ("bits", bits, BITS),
            ("stride", stride, STRIDES),
            ("resolution", resolution, RESOLUTIONS),
        ):
            if value not in valid:
                raise ValueError(f"{name} must be one of {list(valid)}, got {value!r}")
        if max_bytes is not None and not (isinstance(max_bytes, int) and max_bytes > 0):
            raise ValueError(
                f"max_bytes must be a number of bytes above 0, e.g. 16 * 2**30, or None, got {max_bytes!r}"
            )
        # A protocol's check reads its attributes, and a store of files opens when it is asked for its settings.
        if store is not None and not isinstance(store, (DirectoryStore, Store)):
            raise TypeError(f"store must be a backend such as HostStore(), or None, got {store!r}")
        self.bits, self.stride, self.resolution = bits, stride, resolution
        self.store: Store = HostStore() if store is None else store
        self.max_bytes = max_bytes
        self.seed = None if seed_from is None else Seed(seed_from, stride)
        self.settings: MemorySettings | None = None
        self._codes: DeltaCodes | None = None
        self._counts: Counter[str] = Counter()

    def __repr__(self) -> str:
        return (
            f"PerturbationMemory(bits={self.bits}, stride={self.stride}, resolution={self.resolution!r}, "
            f"{len(self.store)} images, {human(self.store.nbytes)})"
        )

    @property
    def codes(self) -> DeltaCodes:
        """How values are packed; known once :meth:`bind` was called."""
        return self._bound()[1]

    def bind(self, settings: MemorySettings) -> DeltaCodes:
        """Say what the perturbations are made with. A setting that was not said before is taken over.

        Raises:
            ValueError: the memory, or what its store holds, was made with other settings: each difference is named. Or ``bits`` are
                too few for the step.
        """
        now = {**settings.as_dict(), "bits": self.bits, "stride": self.stride}
        there = self.store.settings
        if there is not None:
            differ = differences(there, now)
            if differ:
                place = f", {self.store.directory}," if isinstance(self.store, DirectoryStore) else ""
                raise ValueError(
                    f"this perturbation memory{place} was made for other settings ({'; '.join(differ)}): its perturbations are not "
                    "this run's. Give this run a memory of its own, or the settings it was made with"
                )
            now = {name: there.get(name) if value == "" else value for name, value in now.items()}
        codes = DeltaCodes.of(settings.eps, settings.step, self.bits)
        bound = MemorySettings(**{name: now.get(name, "") for name in settings.as_dict()})
        if self.seed is not None:
            self.seed.check(bound)
        self.store.settings = now
        self.settings, self._codes = bound, codes
        return codes

    def fetch(
        self, ids: Sequence[int], views: Sequence[View], device: torch.device | str
    ) -> list[Record | None]:
        """The record of each image, on ``device``; None where the image is unknown or its canonical size has changed.

        Both are counted, apart (``unknown``, ``resized``).
        """
        self._bound()
        if len(ids) != len(views):
            raise ValueError(f"expected one view per image: {len(ids)} ids, {len(views)} views")
        return [self._fetch(int(i), view, torch.device(device)) for i, view in zip(ids, views, strict=True)]

    def _fetch(self, id: int, view: View, device: torch.device) -> Record | None:
        record = self.store.get(id, device)
        if record is not None and record.size != view.canonical:
            self._counts["resized"] += 1
            if self._counts["resized"] == FORGOTTEN_VIEWS > self._counts["hits"]:
                warnings.warn(
                    f"{FORGOTTEN_VIEWS} images had another size than at their last visit and started anew: where a loader crops or resizes "
                    "say how by views=",
                    stacklevel=2,
                )
            return None
        if record is None and self.seed is not None:
            return self._seeded(id, view, device)
        self._counts["unknown" if record is None else "hits"] += 1
        return record

    def _seeded(self, id: int, view: View, device: torch.device) -> Record | None:
        settings, codes = self._bound()
        assert self.seed is not None
        try:
            record = self.seed.record(id, codes, settings)
        except (Unreadable, OSError) as error:
            self._counts["damaged seeds"] += 1
            if self._counts["damaged seeds"] == 1:
                text = f"{self.seed.set.directory}: {error}; that image starts at random. Such are counted"
                warnings.warn(text, stacklevel=2)
            record = None
        if record is None or record.size != view.canonical:
            self._counts["unknown" if record is None else "resized"] += 1
            return None
        self._counts["seeded"] += 1
        self.put(id, record)
        velocity = None if record.velocity is None else record.velocity.to(device)
        return replace(record, delta=record.delta.to(device), velocity=velocity)

    def put(self, id: int, record: Record) -> None:
        """Keep an image's record, in place of the one that was there.

        Raises:
            ValueError, TypeError: the record is not what these settings make.
            MemoryError: ``max_bytes`` would be passed.
        """
        settings, codes = self._bound()
        cells = tuple(-(-side // self.stride) for side in record.size)
        expected = codes.nbytes(settings.channels, *cells)
        if record.delta.dtype != torch.uint8 or record.delta.shape != (expected,):
            raise ValueError(
                f"a record of {record.size} is uint8 [{expected}] ({settings.channels} channels, {cells[0]} x {cells[1]} cells of "
                f"{self.bits} bits), got {record.delta.dtype} {list(record.delta.shape)}"
            )
        shape = (settings.channels, *cells)
        if settings.momentum and (record.velocity is None or tuple(record.velocity.shape) != shape):
            got = None if record.velocity is None else list(record.velocity.shape)
            raise ValueError(f"momentum {settings.momentum:g} needs a velocity {list(shape)}, got {got}")
        if record.velocity is not None and record.velocity.dtype != torch.float16:
            raise TypeError(f"velocity must be float16, got {record.velocity.dtype}")
        if self.max_bytes is not None and self.store.nbytes + record.nbytes > self.max_bytes:
            self._refuse_growth(id, record)
        self.store.put(int(id), record)
        self._counts["stored"] += 1

    def _refuse_growth(self, id: int, record: Record) -> None:
        there = self.store.get(int(id), torch.device("cpu"))
        grown = self.store.nbytes + record.nbytes - (0 if there is None else there.nbytes)
        if grown > (self.max_bytes or grown):
            raise MemoryError(
                f"perturbation memory: with one more image it would take {human(grown)}, and max_bytes is "
                f"{human(self.max_bytes or 0)}. Raise it, or write fewer bits or stride=2; forecast(sizes) says beforehand what is needed"
            )

    def forecast(
        self,
        sizes: Iterable[tuple[int, int]],
        *,
        resolution: str | None = None,
        others: Mapping[str, Iterable[tuple[int, int]]] | None = None,
        channels: int | None = None,
        momentum: bool | None = None,
    ) -> Forecast:
        """What the memory will take for images of these canonical (H, W).

        Args:
            resolution: what the sizes are (default: the memory's own).
            others: the sizes at other resolutions, so that they can be proposed where the memory does not fit.
            channels, momentum: default: as bound, else 3 and none.
        """
        settings = self.settings or MemorySettings(eps=0, step=0)
        name = resolution or self.resolution
        return forecast(
            {**(others or {}), name: sizes},
            bits=self.bits,
            stride=self.stride,
            resolution=name,
            channels=settings.channels if channels is None else channels,
            momentum=settings.momentum > 0 if momentum is None else momentum,
        )

    def require_room(
        self, forecast: Forecast, *, copies: int = 1, share: float = 1.0, available: int | None = None
    ) -> None:
        """Raise before training where the forecast does not fit.

        Args:
            copies: processes of this machine that each keep a memory (the local ranks).
            share: part of the images that each of them meets, in 0..1.
            available: bytes; default: :func:`~ikd_fast.attack.memory.available_bytes`.

        Raises:
            MemoryError: names the settings that would fit.
        """
        free = available_bytes() if available is None else available
        held = self.store.nbytes
        limits = [] if free is None else [(free + held) // copies]
        limits += [] if self.max_bytes is None else [self.max_bytes]
        if not limits or forecast.bytes * share <= min(limits):
            return
        ranks = f" for each of {copies} ranks of this machine" if copies > 1 else ""
        if share < 1:
            ranks = f", {human(forecast.bytes * share)} of it{ranks}"
        needed = forecast.told("" if self._in_files else " of host memory")
        raise MemoryError(
            f"perturbation memory: {needed} are needed{ranks}, {human(min(limits))} may be taken. "
            f"{self._advice(forecast, min(limits) / share)}"
        )

    def _advice(self, forecast: Forecast, limit: float) -> str:
        fitting = sorted(
            ((size, key) for key, size in forecast.choices.items() if size <= limit), reverse=True
        )
        if not fitting:
            return (
                "No number of bits and no stride fits: write attack=dict(type='OnlineDIFGSM', mode='single'), which keeps nothing, or "
                + ("give the files more room" if self._in_files else "give the process more memory")
            )
        lines = [
            f"    memory=dict(bits={bits}, stride={stride}, resolution={name!r})  # {human(size)}{self._step_for(bits)}"
            for size, (bits, stride, name) in fitting
        ]
        return "These settings fit:\n" + "\n".join(lines)

    @property
    def _in_files(self) -> bool:
        return isinstance(self.store, DirectoryStore)

    def _step_for(self, bits: int) -> str:
        """What else to write where the bound step does not survive so few levels."""
        if self.settings is None:
            return ""
        try:
            DeltaCodes.of(self.settings.eps, self.settings.step, bits)
        except ValueError:
            return f", with step_size={DeltaCodes.of(self.settings.eps, self.settings.eps, bits).spacing:g}"
        return ""

    @property
    def counters(self) -> dict[str, int]:
        """``hits``; cold starts: ``unknown`` ids, ``resized`` images; ``stored`` puts; ``images`` and ``bytes`` that are kept; with
        ``seed_from``, ``seeded`` images."""
        names = ("hits", "unknown", "resized", "stored", *(["seeded"] if self.seed is not None else []))
        counts = {name: self._counts[name] for name in names}
        return counts | {"images": len(self.store), "bytes": self.store.nbytes}

    def report(self, troubles: Mapping[str, int] | None = None) -> str:
        """The counters in a line. ``troubles``: of the store's records, by kind; default: what it counted."""
        c = self.counters
        seeded = c.get("seeded", 0)
        visits = c["hits"] + c["unknown"] + c["resized"] + seeded
        where = getattr(self.store, "directory", "host memory")
        text = (
            f"perturbation memory: {c['images']} images, {human(c['bytes'])} of {where}; {c['hits']} of {visits} visits had a "
            f"perturbation, {c['unknown']} cold starts of unknown images, {c['resized']} of images whose size had changed"
        )
        text += f", {seeded} seeded" if seeded else ""
        text += f", {self._counts['damaged seeds']} damaged seeds" if self._counts["damaged seeds"] else ""
        found = getattr(self.store, "counts", {}) if troubles is None else troubles
        told = [f"{count} {what}" for what, count in sorted(found.items()) if count]
        return text + (f"; records {', '.join(told)}" if told else "")

    def close(self) -> None:
        """Forget every record."""
        self.store.close()

    def _bound(self) -> tuple[MemorySettings, DeltaCodes]:
        if self.settings is None or self._codes is None:
            raise RuntimeError(
                "this perturbation memory does not know what it is for: call bind(MemorySettings(eps=..., step=...)) first; an "
                "OnlineDIFGSM(mode='carry') does so at its first call"
            )
        return self.settings, self._codes


def build_memory(memory: PerturbationMemory | Mapping[str, Any] | None) -> PerturbationMemory:
    """A memory as it is, or from a dict of its arguments; None: the defaults."""
    if isinstance(memory, PerturbationMemory):
        return memory
    if memory is None:
        return PerturbationMemory()
    if not isinstance(memory, Mapping):
        raise TypeError(
            f"memory must be dict(bits=..., stride=...), a PerturbationMemory or None, got {memory!r}"
        )
    kwargs = dict(memory)
    kwargs.pop("type", None)
    valid = ("bits", "stride", "resolution", "store", "max_bytes", "directory", "shared", "seed_from")
    wrong = sorted(set(kwargs) - set(valid))
    if wrong:
        raise ValueError(f"memory has no setting {wrong}: valid ones are {list(valid)}")
    directory, shared = kwargs.pop("directory", None), kwargs.pop("shared", False)
    if sum((directory is not None, bool(shared), kwargs.get("store") is not None)) > 1:
        raise ValueError(
            f"memory is kept in one place: give one of directory, shared and store, got {dict(memory)}"
        )
    if directory is not None:
        kwargs["store"] = DirectoryStore(directory)
    elif shared:
        kwargs["store"] = SharedStore()
    return PerturbationMemory(**kwargs)
