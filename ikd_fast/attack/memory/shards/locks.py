"""Locks between processes on ranges of a file, and threads of this one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def require_locks() -> None:
    """Raises:
    ImportError: the system has no POSIX locks (Windows), or cannot reserve room in a file (macOS).
    """
    lacks = [name for name in ("posix_fallocate", "fdatasync") if not hasattr(os, name)]
    if fcntl is None or lacks:
        raise ImportError(
            f"perturbations in files need POSIX's {'file locks' if fcntl is None else ' and '.join(lacks)}, which this system has not; "
            "leave directory and shared out of memory=dict(...)"
        )


class RangeLock:
    """POSIX record locks on one open file: of processes, on local and NFS file systems, gone with the process that held them.

    A process loses them all when it closes *any* descriptor of the file, so that a file is opened once a process. Threads of this
    process exclude each other, whatever the range.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._threads = threading.Lock()

    @contextmanager
    def held(self, start: int, length: int = 1) -> Iterator[None]:
        with self._threads:
            fcntl.lockf(self._fd, fcntl.LOCK_EX, length, start, os.SEEK_SET)
            try:
                yield
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, length, start, os.SEEK_SET)
