"""Which slot has an image's record: a hash table in a shard's first bytes, mapped by every process that uses it."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator

import numpy as np

from .layout import ENTRY_BYTES, HEAD_BYTES, MAX_UNITS, ShardHead
from .locks import RangeLock

GOLDEN = 0x9E3779B97F4A7C15
FORGOTTEN = 1
"""A place of an image that has no record any more. No slot is there, and an entry that others were put behind is not emptied."""


class Index:
    """(id, place) entries, linear probing, never removed.

    An entry's place is 8 aligned bytes, which change in one store: a reader finds the old slot or the new one. Who takes a free
    entry or replaces a place holds a lock on it, so that two writers never get the same old slot back.

    Args:
        table: the mapped first bytes of the file.
        head: of the shard.
        locks: of its file.
    """

    def __init__(self, table: mmap.mmap, head: ShardHead, locks: RangeLock) -> None:
        words = np.frombuffer(table, np.uint64, 2 * head.capacity, HEAD_BYTES)
        self._ids, self._places = words[0::2], words[1::2]
        self._capacity, self._locks = head.capacity, locks

    def place(self, id: int) -> int:
        """Of an image's record; 0: it has none."""
        entry = self._find(id)
        return 0 if entry is None else _real(int(self._places[entry]))

    def replace(self, id: int, place: int) -> int:
        """Let ``place`` be an image's record; 0: it has none any more.

        Returns:
            the place that it had, 0 if none.

        Raises:
            OSError: ENOSPC, every entry is another image's.
        """
        entry = self._find(id)
        if entry is None:
            with self._locks.held(0):
                # Another process may have taken one meanwhile, for this image too.
                entry = self._find(id)
                if entry is None:
                    entry = self._free(id)
                    self._ids[entry] = id
                    self._places[entry] = place
                    return 0
        with self._locks.held(HEAD_BYTES + entry * ENTRY_BYTES, ENTRY_BYTES):
            before = int(self._places[entry])
            self._places[entry] = place or FORGOTTEN
        return _real(before)

    def items(self) -> Iterator[tuple[int, int]]:
        """(id, place) of every image with a record."""
        for entry in np.flatnonzero(self._places > FORGOTTEN):
            yield int(self._ids[entry]), int(self._places[entry])

    def __len__(self) -> int:
        return int(np.count_nonzero(self._places > FORGOTTEN))

    @property
    def units(self) -> int:
        """Of all places."""
        places = self._places[self._places > FORGOTTEN]
        return int((places & np.uint64(MAX_UNITS)).sum())

    def close(self) -> None:
        """Let go of the mapping, which cannot be closed while arrays look into it."""
        del self._ids, self._places

    def _find(self, id: int) -> int | None:
        for entry in self._probe(id):
            # A place is written after its id, so that an entry with a place has its id too.
            if not self._places[entry]:
                return None
            if int(self._ids[entry]) == id:
                return entry
        return None

    def _free(self, id: int) -> int:
        for entry in self._probe(id):
            if not self._places[entry]:
                return entry
        raise OSError(errno.ENOSPC, f"the shard's index of {self._capacity} images is full")

    def _probe(self, id: int) -> Iterator[int]:
        start = (id * GOLDEN & 0xFFFFFFFFFFFFFFFF) % self._capacity
        for k in range(self._capacity):
            yield (start + k) % self._capacity


def _real(place: int) -> int:
    return 0 if place == FORGOTTEN else place
