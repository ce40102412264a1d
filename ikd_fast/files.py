"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def write_bytes(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Write ``data`` to ``path`` through a temporary file in the same folder; ``sync``: whole also after the machine fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, through a temporary file."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_versioned(
    path: Path, key: str, version: int, make: Callable[[dict[str, Any]], T], expected: str, advice: str = ""
) -> T | None:
    """What ``make`` makes of a JSON object whose ``key`` is ``version``; None where there is no such file.

    Raises:
        ValueError: it is something else; names the file, what was ``expected``, and the ``advice``.
    """
    try:
        found = json.loads(path.read_text())
        there = found.pop(key)
        if there == version:
            return make(found)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected {expected} ({type(error).__name__}: {error}){advice}") from None
    raise ValueError(f"{path}: {key} {there}, expected {version}; made by another version of ikd_fast")
