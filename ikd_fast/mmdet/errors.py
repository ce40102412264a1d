"""What a user of the adapters can put right, as one message."""

from __future__ import annotations


class InputError(ValueError):
    """A file or an argument that cannot be used: the message says what was expected, what came and what to write.

    ``usage`` is True when the command line itself is wrong (exit code 2) and False when a file's contents are (exit code 1).
    """

    def __init__(self, message: str, *, usage: bool = False) -> None:
        super().__init__(message)
        self.usage = usage
