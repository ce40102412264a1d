"""One file of records, which any number of processes read and write at the same time."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from ikd_fast.attack.memory.record import Record

from .index import Index
from .layout import (
    END_AT,
    HEAD_BYTES,
    RECORD_HEAD,
    UNIT,
    Entry,
    ShardHead,
    Unreadable,
    decode_entry,
    decode_record,
    encode_record,
    place_of,
    slot_of,
    units_of,
)
from .locks import RangeLock
from .slots import Spares, gaps

GROW = 1 << 25
"""A shard grows by an eighth of itself, and by no more than so many bytes."""
ATTEMPTS = 16


class Shard:
    """Records by id.

    A record is written to a slot that nothing refers to, and then the index is pointed at it: whenever a process is killed, an image
    has its old record or its new one. What is read is checked, since its slot may be another image's by then; then the index is asked
    again. Contents go through ``pread`` and ``pwrite``: a full disk is an error there, and would be a signal in a mapping.

    Args:
        path: the file; made if it is not there.
        head: what it is to be.
        new: whether it may be made; without it an empty one is no shard either.

    Raises:
        Unreadable: the file is something else: foreign, damaged, of another version or size.
        OSError: it cannot be opened, or made.
    """

    def __init__(self, path: Path, head: ShardHead, *, new: bool = True) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if new else 0), 0o644)
        try:
            self._locks = RangeLock(self._fd)
            with self._locks.held(0):
                self.head = self._prepare(head, new)
            self._map = mmap.mmap(self._fd, self.head.data_start)
        except BaseException:
            os.close(self._fd)
            raise
        self._index = Index(self._map, self.head, self._locks)
        self._spares = Spares()

    def _prepare(self, head: ShardHead, new: bool) -> ShardHead:
        size = os.fstat(self._fd).st_size
        if size == 0 and new:
            # Room first: a mapping of what the disk does not have is a signal later.
            try:
                os.posix_fallocate(self._fd, 0, head.data_start)
            except OSError:
                os.ftruncate(self._fd, 0)
                raise
            os.pwrite(self._fd, struct.pack("<Q", head.data_start), END_AT)
            os.pwrite(self._fd, head.encode(), 0)
            return head
        found = ShardHead.decode(os.pread(self._fd, HEAD_BYTES, 0))
        if (found.number, found.shards) != (head.number, head.shards):
            raise Unreadable(
                f"shard {found.number} of {found.shards}, expected {head.number} of {head.shards}"
            )
        if size < found.data_start:
            raise Unreadable(f"{size} bytes, shorter than its own index")
        return found

    def get(self, id: int) -> Record | None:
        """An image's record; None: it has none.

        Raises:
            Unreadable: it has one, which is damaged.
            OSError: it cannot be read.
        """
        place, problem = self._index.place(id), None
        for _ in range(ATTEMPTS):
            if not place:
                return None
            unit, units = slot_of(place)
            try:
                return decode_record(id, os.pread(self._fd, units * UNIT, unit * UNIT))
            except Unreadable as error:
                problem = error
            # Replaced while it was read?
            place, before = self._index.place(id), place
            if place == before:
                break
        raise Unreadable(f"{self.path.name}: record of image {id}: {problem}")

    def put(self, id: int, record: Record) -> None:
        """Replace an image's record.

        Raises:
            OSError: no room, or it cannot be written; the image keeps the record that it had.
        """
        data = encode_record(id, record)
        units = units_of(len(data))
        unit = self._spares.take(units)
        if unit is None:
            unit = self._allocate(units)
        try:
            _write(self._fd, data, unit * UNIT)
            before = self._index.replace(id, place_of(unit, units))
        except BaseException:
            self._spares.give(unit, units)
            raise
        if before:
            self._spares.give(*slot_of(before))

    def _allocate(self, units: int) -> int:
        with self._locks.held(END_AT, 8):
            (end,) = struct.unpack_from("<Q", self._map, END_AT)
            needed = end + units * UNIT
            size = os.fstat(self._fd).st_size
            if needed > size:
                ahead = max(needed, size + min(size // 8, GROW))
                try:
                    os.posix_fallocate(self._fd, size, ahead - size)
                except OSError:
                    # A disk that is nearly full is filled to its end.
                    os.posix_fallocate(self._fd, size, needed - size)
            struct.pack_into("<Q", self._map, END_AT, needed)
        return end // UNIT

    def recover(self) -> int:
        """Find free slots, of which a process that was killed kept some. Only where no other process has the file open.

        Returns:
            records whose slot overlaps another's or lies outside the file: their images start anew.
        """
        (end,) = struct.unpack_from("<Q", self._map, END_AT)
        start, size = self.head.data_start, os.fstat(self._fd).st_size
        if not start <= end or end % UNIT:
            end = size // UNIT * UNIT
            struct.pack_into("<Q", self._map, END_AT, end)
        images: dict[tuple[int, int], list[int]] = {}
        for id, place in self._index.items():
            images.setdefault(slot_of(place), []).append(id)
        free, wrong = gaps(images, start // UNIT, end // UNIT)
        lost = [id for slot in wrong for id in images[slot]]
        # Of images that share a slot, it is the one's whose record lies there.
        lost += [
            id for slot, ids in images.items() if len(ids) > 1 and slot not in wrong
            for id in ids if not self._holds(slot, id)
        ]  # fmt: skip
        for id in lost:
            self._index.replace(id, 0)
        self._spares = Spares()
        for unit, units in free:
            self._spares.give(unit, units)
        return len(lost)

    def _holds(self, slot: tuple[int, int], id: int) -> bool:
        unit, units = slot
        try:
            decode_entry(id, os.pread(self._fd, RECORD_HEAD, unit * UNIT), units * UNIT)
        except Unreadable:
            return False
        return True

    def records(self) -> Iterator[Entry]:
        """What the heads of all records say; those that cannot be read are left out."""
        for id, place in self._index.items():
            unit, units = slot_of(place)
            try:
                yield decode_entry(id, os.pread(self._fd, RECORD_HEAD, unit * UNIT), units * UNIT)
            except Unreadable:
                continue

    def copy_to(self, path: Path) -> int:
        """Write all records that can be read to a shard of its own, one behind the other.

        Returns:
            how many could not be read.
        """
        successor, dropped = Shard(path, self.head), 0
        try:
            for id in list(self.ids()):
                try:
                    record = self.get(id)
                except Unreadable:
                    dropped += 1
                    continue
                if record is not None:
                    successor.put(id, record)
            (end,) = struct.unpack_from("<Q", successor._map, END_AT)
            os.ftruncate(successor._fd, end)
            successor.sync()
        finally:
            successor.close()
        return dropped

    def ids(self) -> Iterator[int]:
        """Of every record."""
        for id, _ in self._index.items():
            yield id

    def __len__(self) -> int:
        return len(self._index)

    @property
    def nbytes(self) -> int:
        """Bytes of the slots that are referred to."""
        return self._index.units * UNIT

    def sync(self) -> None:
        """Have it on the disk, for a machine that fails."""
        self._map.flush()
        os.fdatasync(self._fd)

    def vanished(self) -> bool:
        """Whether the file that is open is no longer the one at its path."""
        try:
            there = os.stat(self.path)
        except OSError:
            return True
        here = os.fstat(self._fd)
        return (here.st_ino, here.st_dev) != (there.st_ino, there.st_dev)

    def close(self) -> None:
        self._index.close()
        self._map.close()
        os.close(self._fd)


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
