"""What a file that cannot be used raises."""

from __future__ import annotations


class BadImage(ValueError):
    """An image file, or its annotation, that cannot be used: one line with the file and the reason.

    Args:
        path: the file.
        reason: what was expected and what came.
    """

    def __init__(self, path: str, reason: str) -> None:
        shown = path if path.isprintable() else repr(path)
        super().__init__(f"{shown}: {' '.join(reason.split())}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple:
        return BadImage, (self.path, self.reason)
