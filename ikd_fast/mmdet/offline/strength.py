"""What the attack did to each image, a line of JSON an image."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

from ikd_fast.files import write_bytes

PARTS, NAME = "strength", "strength.jsonl"
MEANS = ("class_loss", "adversarial_class_loss", "feature_change", "mean_abs", "outside")


class Strength:
    """The lines of one process, written as they come."""

    def __init__(self, out: Path, processes: Any) -> None:
        run = hashlib.blake2b(processes.run.encode(), digest_size=4).hexdigest()
        self._path = out / PARTS / f"{run}-{processes.rank}.jsonl"
        self._file: BinaryIO | None = None

    def add(self, row: dict[str, Any]) -> None:
        if self._file is None:
            self._path.parent.mkdir(exist_ok=True)
            self._file = open(self._path, "ab")  # noqa: SIM115
            if self._file.tell():
                self._file.write(b"\n")  # the last line of a process that was killed may lack its end
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def merged(out: Path, names: set[str]) -> dict[str, Any]:
    """Bring the lines of all processes together in ``strength.jsonl``, one for each file of ``names``; means over them.

    Lines that were cut short are left out; of several for one file the latest of a process counts, and they agree. ``measured``: how many.
    """
    rows: dict[str, dict[str, Any]] = {}
    parts = sorted((out / PARTS).glob("*.jsonl"))
    for path in [out / NAME, *parts]:
        for line in path.read_bytes().splitlines() if path.is_file() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row.get("file") in names:
                rows[row["file"]] = row
    write_bytes(out / NAME, b"".join(json.dumps(rows[name]).encode() + b"\n" for name in sorted(rows)))
    for path in parts:
        path.unlink()
    if (out / PARTS).is_dir():
        (out / PARTS).rmdir()
    # In one order, whichever process wrote what: sums are rounded.
    found = [rows[name] for name in sorted(rows)]
    if not found:
        return {"measured": 0}
    summary: dict[str, Any] = {name: round(sum(row[name] for row in found) / len(found), 6) for name in MEANS}
    return summary | {"linf": max(row["linf"] for row in found), "measured": len(found)}
