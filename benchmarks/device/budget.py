"""A time limit for the whole run and for each of its parts; what no longer fits is listed, never silently left out."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

# Result files hold no paths of the machine they were made on.
_PATH = re.compile(r"(?<![\w.])(?:/[\w.~+-]+){2,}")


def reason_of(error: BaseException) -> str:
    """One line of an error, without paths.

    >>> reason_of(OSError("cannot read /home/someone/data"))
    'OSError: cannot read (path)'
    """
    text = " ".join(str(error).split())[:300]
    return _PATH.sub("(path)", f"{type(error).__name__}: {text}")


@dataclass
class Budget:
    """Seconds for the run; ``section`` ends at its own limit or with the run, whichever comes first."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    skipped: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = self.clock()
        self._end = self.start + self.seconds
        self._section_end = self._end

    def section(self, seconds: float) -> None:
        """Begin a part of the run that may take ``seconds``."""
        self._section_end = min(self._end, self.clock() + seconds)

    @property
    def left(self) -> float:
        """Seconds left in this section."""
        return self._section_end - self.clock()

    @property
    def used(self) -> float:
        return self.clock() - self.start

    def allows(self, name: str, seconds: float) -> bool:
        """Whether ``name``, which takes about ``seconds``, still fits; otherwise it is listed as skipped."""
        if self.left >= seconds:
            return True
        self.skip(
            name, f"no time left: it takes about {seconds:.0f} s and {max(self.left, 0):.0f} s were left"
        )
        return False

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append({"name": name, "reason": reason})
