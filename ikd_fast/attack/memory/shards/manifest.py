"""``memory.json``: what a directory of records was made with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ikd_fast.files import read_versioned, write_bytes

NAME, FORMAT = "memory.json", 1


@dataclass(frozen=True)
class Manifest:
    """Shards, entries of each one's index, and the settings of what is kept (None: nothing yet)."""

    shards: int
    capacity: int
    settings: Mapping[str, Any] | None = None

    def write(self, directory: Path) -> None:
        """Whole or not at all."""
        data = json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode() + b"\n"
        write_bytes(directory / NAME, data, sync=True)

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """None where there is none.

        Raises:
            ValueError: it cannot be read; names the file.
        """
        return read_versioned(
            directory / NAME,
            "format",
            FORMAT,
            lambda found: cls(int(found["shards"]), int(found["capacity"]), found["settings"]),
            "a perturbation memory's manifest",
            ". Move the directory away, or restore it",
        )
