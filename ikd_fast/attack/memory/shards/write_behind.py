"""Records on their way to the files: a thread writes them while training goes on."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from ikd_fast.attack.memory.record import Record

MAX_PENDING = 1 << 28
"""Bytes that wait to be written; beyond it ``put`` waits."""


class WriteBehind:
    """One thread that hands records to ``write``.

    Args:
        write: ``write(id, record)``; what it raises is given to ``failed``.
        failed: ``failed(id, error)``, called in the thread.
        max_pending: bytes.
    """

    def __init__(
        self,
        write: Callable[[int, Record], None],
        failed: Callable[[int, Exception], None],
        max_pending: int = MAX_PENDING,
    ) -> None:
        self._write, self._failed, self._max = write, failed, max_pending
        self._waiting: OrderedDict[int, Record] = OrderedDict()
        self._writing: tuple[int, Record] | None = None
        self._bytes = 0
        self._over = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, id: int, record: Record) -> None:
        """Let ``record``, on the CPU and nobody else's, be written; it replaces one of its image that still waits."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ikd_fast-memory", daemon=True)
                self._thread.start()
            while self._bytes > self._max:
                self._changed.wait()
            old = self._waiting.pop(id, None)
            self._bytes += record.nbytes - (0 if old is None else old.nbytes)
            self._waiting[id] = record
            self._changed.notify_all()

    def get(self, id: int) -> Record | None:
        """The record of an image that is not written yet."""
        with self._changed:
            if id in self._waiting:
                return self._waiting[id]
            return self._writing[1] if self._writing is not None and self._writing[0] == id else None

    def flush(self) -> None:
        """Wait until nothing waits."""
        with self._changed:
            while self._waiting or self._writing is not None:
                self._changed.wait()

    def close(self) -> None:
        """Write what waits, and end the thread."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._over:
                    self._changed.wait()
                if not self._waiting:
                    return
                self._writing = id, record = self._waiting.popitem(last=False)
            try:
                self._write(id, record)
            except Exception as error:  # a thread that dies would leave flush waiting for ever
                self._failed(id, error)
            finally:
                with self._changed:
                    self._writing = None
                    self._bytes -= record.nbytes
                    self._changed.notify_all()
