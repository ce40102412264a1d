"""The one exception that the command line turns into a message instead of a traceback."""

from __future__ import annotations


class DemoError(RuntimeError):
    """Something the user can put right: the message says what was expected, what came and what to write.

    ``usage`` is True when the command line itself is wrong (exit code 2) and False when the work failed (exit code 1).
    """

    def __init__(self, message: str, *, usage: bool = False) -> None:
        super().__init__(message)
        self.usage = usage
