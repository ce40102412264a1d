"""Backends of files: a directory that stays, and shared memory of a machine's processes."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from ikd_fast.attack.memory.record import Record
from ikd_fast.attack.memory.store import HostStore

from .layout import Entry, ShardHead, Unreadable
from .locks import require_locks
from .manifest import NAME, Manifest
from .run_lock import RunLock
from .shard import Shard
from .write_behind import MAX_PENDING, WriteBehind

logger = logging.getLogger("ikd_fast")
SHARDS, CAPACITY = 64, 1 << 14
"""By default: room for a million images, which takes 16 MiB."""
SUFFIX = ".ikdmem"
IDS = (1 << 64) - 1


_OPEN: WeakSet[DirectoryStore] = WeakSet()


@atexit.register
def close_all() -> None:
    """Write what waits, of every store of this process: also when it ends by Ctrl-C."""
    for store in list(_OPEN):
        store.leave()


def _in_a_fork() -> None:
    # What a loader's worker wrote would not be the run's, and its locks would go with its copies of the files.
    for store in list(_OPEN):
        store._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_fork)


def shard_file(directory: Path, manifest: Manifest, number: int) -> tuple[Path, ShardHead]:
    """Where a shard is, and what it is to be."""
    return directory / f"{number:04d}{SUFFIX}", ShardHead(manifest.capacity, number, manifest.shards)


@dataclass(frozen=True)
class _Copied(Record):
    """A record whose copy to the host may still run."""

    event: Any = None


class DirectoryStore:
    """Records in the shards of a directory: kept when the run ends, shared by its processes, on a local or shared file system.

    ``put`` copies and returns; a thread writes. A record is replaced whole (see :class:`~.shard.Shard`), so that a process may be killed
    at any moment: what it had not written yet is lost, nothing else. What cannot be read is no record: it is counted, the image
    starts anew. What cannot be written is counted too, said once, and training goes on; so it does, without any record, where the system
    refuses the directory itself (no permission, read-only, full).

    Args:
        directory: made where it is not there.
        shards, capacity: files, and images each has room for, of a directory that is new.
        run: name that the processes of one run have in common; default: this process alone.
        max_pending: bytes that may wait to be written.

    Attributes:
        counts: ``damaged`` records that were read, ``foreign`` shards set aside, ``not written`` and ``not read`` (the system's errors),
            ``gone`` with files that were removed in use.
        say: is given each kind of trouble once, as a sentence; default: a warning of the logger ``ikd_fast``.
        told: the kinds that it was given.

    Raises:
        RuntimeError: another run is using the directory.
        ValueError: its manifest cannot be read; or a file is where the directory is to be.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        shards: int = SHARDS,
        capacity: int = CAPACITY,
        run: str | None = None,
        max_pending: int = MAX_PENDING,
    ) -> None:
        for name, value, top in (("shards", shards, 4096), ("capacity", capacity, 1 << 30)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= top:
                raise ValueError(f"{name} must be a whole number in 1..{top}, got {value!r}")
        require_locks()
        self.directory = Path(directory)
        self.capacity, self.shards, self.run = capacity, shards, run or uuid.uuid4().hex
        self.counts: Counter[str] = Counter()
        self.say: Callable[[str], None] = logger.warning
        self.told: set[str] = set()
        self._max_pending = max_pending
        self._lock: RunLock | None = None
        self._manifest: Manifest | None = None
        self._shards: list[Shard] = []
        self._behind = WriteBehind(self._write, self._failed, max_pending)

    def open(self) -> None:
        """Join the directory, and put it in order where this process is the first.

        Raises:
            OSError: it cannot be made, read or written; and see the class.
        """
        if self._manifest is not None:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(
                f"{self.directory}: expected a directory for the perturbation memory, or a place for one; a file is in the way"
            ) from None
        lock = RunLock(self.directory / "lock", self.run)
        try:
            manifest = self._put_in_order(lock)
        except BaseException:
            self._close_shards()
            lock.release()
            raise
        self._lock, self._manifest = lock, manifest
        _OPEN.add(self)

    def join(self) -> None:
        """:meth:`open`, or go on without the directory where the system refuses it; whatever is asked of the store does so."""
        if self._manifest is not None:
            return
        try:
            self.open()
        except OSError as error:
            self._manifest = Manifest(self.shards, self.capacity)
            self._say_without(error)

    def _put_in_order(self, lock: RunLock) -> Manifest:
        there = Manifest.read(self.directory)
        manifest = there or Manifest(self.shards, self.capacity)
        if lock.first and there is None:
            # It is written before the first shard: what is there without it was made nobody knows with what.
            for path in sorted(self.directory.glob(f"*{SUFFIX}")):
                self._set_aside(path, f"a shard without {NAME}")
            manifest.write(self.directory)
        self._open_shards(manifest, lock.first)
        if lock.first:
            self.counts["damaged"] += sum(shard.recover() for shard in self._shards)
            if there is not None and not len(self):
                manifest = self._made_anew(manifest)
            lock.opened()
        return manifest

    def _made_anew(self, manifest: Manifest) -> Manifest:
        """For any settings, and with room for this run's images, where an earlier run kept nothing."""
        if manifest.capacity < self.capacity:
            paths = [shard.path for shard in self._shards]
            self._close_shards()
            for path in paths:
                path.unlink()
            manifest = Manifest(self.shards, self.capacity)
            manifest.write(self.directory)
            self._open_shards(manifest, first=True)
        elif manifest.settings is not None:
            manifest = replace(manifest, settings=None)
            manifest.write(self.directory)
        return manifest

    def _open_shards(self, manifest: Manifest, first: bool) -> None:
        for number in range(manifest.shards):
            self._shards.append(self._open_shard(manifest, number, first))

    @property
    def is_open(self) -> bool:
        """Whether this process has joined the directory, and uses it."""
        return bool(self._shards)

    def _open_shard(self, manifest: Manifest, number: int, first: bool) -> Shard:
        path, head = shard_file(self.directory, manifest, number)
        try:
            return Shard(path, head)
        except Unreadable as error:
            if not first:
                raise RuntimeError(f"{path}: {error}") from None
            self._set_aside(path, str(error))
            return Shard(path, head)

    def _set_aside(self, path: Path, why: str) -> None:
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.aside")
        path.rename(aside)
        self.counts["foreign"] += 1
        self.say(
            f"ikd_fast perturbation memory: {path}: {why}; set aside as {aside.name}, its images start anew"
        )

    @property
    def settings(self) -> Mapping[str, Any] | None:
        return self._joined().settings

    @settings.setter
    def settings(self, settings: Mapping[str, Any] | None) -> None:
        changed = replace(self._joined(), settings=None if settings is None else dict(settings))
        if changed != self._manifest and self.is_open:
            try:
                changed.write(self.directory)
            except OSError as error:
                # Records that nobody can tell the settings of are of no use to a later run, and may do harm.
                self.leave()
                self._say_without(error)
        self._manifest = changed

    def _joined(self) -> Manifest:
        self.join()
        assert self._manifest is not None
        return self._manifest

    def get(self, id: int, device: torch.device) -> Record | None:
        """A record of its own on ``device``, or None."""
        self.join()
        if not self.is_open:
            return None
        id &= IDS
        waiting = self._behind.get(id)
        if waiting is not None:
            if isinstance(waiting, _Copied) and waiting.event is not None:
                waiting.event.synchronize()
            return _copy(waiting, device)
        try:
            record = self._shard(id).get(id)
        except Unreadable as error:
            self._trouble("damaged", str(error))
            return None
        except OSError as error:
            self._trouble("not read", f"{self.directory}: {error.strerror or error}")
            return None
        return record if record is None or device.type == "cpu" else _copy(record, device)

    def put(self, id: int, record: Record) -> None:
        """Take a copy of ``record``; it is read back at once, and written soon."""
        self.join()
        if self.is_open:
            self._behind.put(id & IDS, _to_host(record))
        else:
            self.counts["not written"] += 1

    def flush(self) -> None:
        """Wait until all that was put is in the files, where every process and a later run finds it."""
        self._behind.flush()
        gone = [shard for shard in self._shards if shard.vanished()]
        if gone:
            self._trouble(
                "gone",
                f"{self.directory} was removed or replaced while it was in use, and goes with this run",
                sum(len(shard) for shard in gone) - self.counts["gone"],
            )

    def sync(self) -> None:
        """:meth:`flush`, and have it on the disk, for a machine that fails."""
        self.flush()
        for shard in self._shards:
            try:
                shard.sync()
            except OSError as error:
                self._trouble("not synced", f"{shard.path}: {error.strerror or error}", len(shard))

    def ids(self) -> Iterator[int]:
        """Of every record that is written."""
        for shard in self._shards:
            yield from shard.ids()

    @property
    def shards_open(self) -> list[Shard]:
        """Its files, while it is open."""
        return list(self._shards)

    def records(self) -> Iterator[Entry]:
        """What is written of every image, without its contents."""
        for shard in self._shards:
            yield from shard.records()

    def __len__(self) -> int:
        return sum(len(shard) for shard in self._shards)

    def __contains__(self, id: int) -> bool:
        return self.get(id, torch.device("cpu")) is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the slots of all records."""
        return sum(shard.nbytes for shard in self._shards)

    def close(self) -> None:
        """:meth:`leave`: the records stay."""
        self.leave()

    def leave(self) -> None:
        """Write what waits, and let others have the directory."""
        if self._manifest is None:
            return
        self._behind.close()
        self._close_shards()
        self._forget()

    def _close_shards(self) -> None:
        while self._shards:
            self._shards.pop().close()

    def _forget(self) -> None:
        """As if it had never been opened."""
        if self._lock is not None:
            self._lock.release()
        self._lock, self._manifest, self._shards = None, None, []
        self._behind = WriteBehind(self._write, self._failed, self._max_pending)

    def __deepcopy__(self, memo: dict) -> HostStore:
        """Of a copied model (an EMA, a snapshot): a store of its own in memory, empty."""
        twin = HostStore()
        twin.settings = self._manifest.settings if self._manifest is not None else None
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """What is pickled is the directory's name, closed."""
        return _closed, (
            type(self),
            dict(directory=self.directory, shards=self.shards, capacity=self.capacity, run=self.run),
        )

    def _shard(self, id: int) -> Shard:
        return self._shards[id % len(self._shards)]

    def _write(self, id: int, record: Record) -> None:
        if isinstance(record, _Copied) and record.event is not None:
            record.event.synchronize()
        self._shard(id).put(id, record)

    def _failed(self, id: int, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or str(error)
        self._trouble("not written", f"{self.directory}: {reason}")

    def _trouble(self, what: str, why: str, count: int = 1) -> None:
        self.counts[what] += count
        if what not in self.told:
            self.told.add(what)
            self.say(
                f"ikd_fast perturbation memory: record {what}: {why}. Training goes on; such records are counted"
            )

    def _say_without(self, error: OSError) -> None:
        self.told.add("not written")
        self.say(
            f"ikd_fast perturbation memory: {self.directory} cannot be used ({error.strerror or error}). Training goes on without it: "
            "every visit is a first one, and what would have been written is counted"
        )


class SharedStore(DirectoryStore):
    """Records in one file of shared memory, for the processes of one machine.

    They outlast a process that is killed or stopped, not the machine: a run that goes on finds them by ``name``. :meth:`close`, of a
    run that is over, removes them.

    Args:
        name: of the folder; default: that of the run.
        run: name that the processes have in common; default: this process alone.
        folder: where shared memory is.
        capacity: images there is room for.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        run: str | None = None,
        folder: str | os.PathLike[str] = "/dev/shm",
        capacity: int = 1 << 18,
        max_pending: int = MAX_PENDING,
    ) -> None:
        super().__init__(folder, shards=1, capacity=capacity, run=run, max_pending=max_pending)
        self.name, self._folder = name, Path(folder)

    def open(self) -> None:
        """Join it, or make it."""
        if self._manifest is None:
            self.directory = self._folder / f"ikd_fast-{self.name or self.run}"
            new = not self.directory.exists()
            try:
                super().open()
            except OSError:
                if new:
                    self._remove()
                raise

    def close(self) -> None:
        """:meth:`leave` it; the last process removes it."""
        was_open = self.is_open
        self.leave()
        if was_open:
            self._remove()

    def _remove(self) -> None:
        if RunLock.alone(self.directory / "lock"):
            shutil.rmtree(self.directory, ignore_errors=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return _closed, (
            SharedStore,
            dict(name=self.name, run=self.run, folder=self._folder, capacity=self.capacity),
        )


def _to_host(record: Record) -> Record:
    if record.delta.device.type != "cuda":
        return _copy(record, torch.device("cpu"))
    event = torch.cuda.Event()
    delta, velocity = _pinned(record.delta), None if record.velocity is None else _pinned(record.velocity)
    event.record(torch.cuda.current_stream(record.delta.device))
    return _Copied(record.size, record.visits, record.step, delta, velocity, event)


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
        tensor.detach(), non_blocking=True
    )


def _copy(record: Record, device: torch.device) -> Record:
    delta = record.delta.detach().to(device, copy=True)
    velocity = None if record.velocity is None else record.velocity.detach().to(device, copy=True)
    return Record(record.size, record.visits, record.step, delta, velocity)


def _closed(kind: type[DirectoryStore], arguments: dict[str, Any]) -> DirectoryStore:
    return kind(**arguments)
