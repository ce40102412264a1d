"""Keep what libraries print out of the user's way, in a file."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path


class _LogFile(io.TextIOBase):
    """A stream that appends to the file :func:`quiet` names; never closed, since loggers keep the stream they were made with."""

    path: Path | None = None

    def write(self, text: str) -> int:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        return len(text)


_log = _LogFile()


@contextlib.contextmanager
def quiet(path: Path) -> Iterator[None]:
    """Send what Python code prints or logs inside the block to the end of ``path``. Blocks may be nested."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before, _log.path = _log.path, path
    try:
        with contextlib.redirect_stdout(_log), contextlib.redirect_stderr(_log):
            yield
    finally:
        _log.path = before
