"""One run on a directory at a time: any number of processes of it, and nobody else."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from weakref import WeakSet

from .locks import fcntl

WAIT_SECONDS = 60.0
PATIENCE = 2.0
"""Seconds after which another run's name counts: whoever is first may not have written its own yet."""
_HELD: WeakSet[RunLock] = WeakSet()


def _in_a_fork() -> None:
    # A loader's worker would hold the run's lock after its parent was killed, and the next run would be refused.
    for lock in list(_HELD):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_fork)


class RunLock:
    """Membership of a run.

    The first process holds the lock alone until it has put the directory in order (:meth:`opened`), then shares it with others of the
    same ``run``. The system lets go of it with the process, however that ends.

    Args:
        path: the lock's file.
        run: name that the processes of a run have in common.
        what: what is locked, for the message.

    Attributes:
        first: whether this process is alone, and has to put things in order.

    Raises:
        RuntimeError: another run has the directory; says which.
    """

    def __init__(self, path: Path, run: str, what: str = "perturbation memory") -> None:
        self.path, self.run, self.what = path, run, what
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self.first = self._enter()
        except BaseException:
            self.release()
            raise
        _HELD.add(self)

    def _enter(self) -> bool:
        begun = time.monotonic()
        while True:
            if self._try(fcntl.LOCK_EX):
                told = {"run": self.run, "pid": os.getpid(), "host": socket.gethostname()}
                text = json.dumps(told).encode()
                # In this order a full disk keeps the block that it has.
                os.pwrite(self._fd, text, 0)
                os.ftruncate(self._fd, len(text))
                return True
            if self._try(fcntl.LOCK_SH):
                there = self._told()
                if there.get("run") == self.run:
                    return False
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            else:
                # Somebody is alone with it: of this run, and will share it in a moment, or at work on it.
                there = self._told()
            own = there.get("run") in (None, self.run)
            if time.monotonic() - begun > (WAIT_SECONDS if own else PATIENCE):
                raise self._refusal(there)
            time.sleep(0.02)

    @staticmethod
    def alone(path: Path) -> bool:
        """Whether it is there, and no process has it."""
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def opened(self) -> None:
        """Let others of this run in.

        Raises:
            RuntimeError: another run was quicker; a lock that changes its kind is free for a moment.
        """
        fcntl.flock(self._fd, fcntl.LOCK_SH)
        if (there := self._told()).get("run") != self.run:
            raise self._refusal(there)

    def last(self) -> bool:
        """Leave; whether no other process was in it any more, and the lock is now this one's alone."""
        return self._try(fcntl.LOCK_EX)

    def release(self) -> None:
        """Leave."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _try(self, kind: int) -> bool:
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _told(self) -> dict:
        try:
            found = json.loads(os.pread(self._fd, 4096, 0))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _refusal(self, there: dict) -> RuntimeError:
        who = f"process {there.get('pid', '?')} on {there.get('host', '?')}"
        return RuntimeError(
            f"{self.path.parent}: another run is using this {self.what} ({who}). One run at a time: wait for it, or give this one "
            "a directory of its own"
        )
