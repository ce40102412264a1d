"""The result file: one JSON object, everything that a figure needs beside it.

::

    {"schema": 1, "created": "2025-01-31T12:00:00+00:00",
     "machine": {"cpu": ..., "cores": 2, "threads": 2, "memory_gib": 15.6, "system": ..., "arch": ...,
                 "load": 0.03, "gpu": null},                   load: average of the minute before the run
     "versions": {"python": "3.11.7", "torch": ..., "numpy": ..., "ikd_fast": ...},      and every peer installed
     "commit": {"id": "4f0c...", "dirty": false},
     "benchmarks": [{"group": ..., "side": ..., "role": "ours" | "peer", "targets": {peer: times as fast},
                     "median": seconds, "q1": ..., "q3": ..., "min": ..., "rounds": 7, "notes": {name: number or text}}],
     "skipped": [{"name": ..., "reason": ...}]}
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

VERSION = 1
ROLES = ("ours", "peer")
MIN_ROUNDS = 5

FIELDS: dict[str, Mapping[str, type | tuple[type, ...]]] = {
    "": {
        "schema": int,
        "created": str,
        "machine": dict,
        "versions": dict,
        "commit": dict,
        "benchmarks": list,
        "skipped": list,
    },
    "machine": {
        "cpu": str,
        "cores": int,
        "threads": int,
        "memory_gib": (int, float),
        "system": str,
        "arch": str,
        "load": (int, float),
        "gpu": (str, type(None)),
    },
    "commit": {"id": str, "dirty": bool},
    "benchmarks": {
        "group": str,
        "side": str,
        "role": str,
        "targets": dict,
        "median": (int, float),
        "q1": (int, float),
        "q3": (int, float),
        "min": (int, float),
        "rounds": int,
        "notes": dict,
    },
    "skipped": {"name": str, "reason": str},
}
_PATH = re.compile(r"(?:^|[\s'\"(])(?:/[\w.~-]+){2,}|[A-Za-z]:\\\\")


def validate(result: Any) -> None:
    """Raise ``ValueError`` naming the first entry that is missing, unknown, of another type or not possible."""
    _fields(result, "", "")
    if result["schema"] != VERSION:
        raise ValueError(f"schema: expected {VERSION}, got {result['schema']}")
    _time(result["created"])
    _fields(result["machine"], "machine", "machine")
    if not 0 <= result["machine"]["load"] < math.inf:
        raise ValueError(f"machine.load: expected an average of 0 or more, got {result['machine']['load']}")
    _fields(result["commit"], "commit", "commit")
    for name in ("python", "torch", "numpy", "ikd_fast"):
        if name not in result["versions"]:
            raise ValueError(f"versions: expected an entry {name!r}, got {sorted(result['versions'])}")
    if not result["benchmarks"]:
        raise ValueError("benchmarks: expected at least one, got none")
    seen = set()
    for i, row in enumerate(result["benchmarks"]):
        where = f"benchmarks[{i}]"
        _fields(row, "benchmarks", where)
        _row(row, where)
        key = (row["group"], row["side"])
        if key in seen:
            raise ValueError(f"{where}: expected each side of a group once, got {key} again")
        seen.add(key)
    for i, row in enumerate(result["skipped"]):
        _fields(row, "skipped", f"skipped[{i}]")
    _no_paths(result, "")


def _fields(value: Any, kind: str, where: str) -> None:
    expected = FIELDS[kind]
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'result'}: expected an object, got {type(value).__name__}")
    if set(value) != set(expected):
        missing, unknown = sorted(set(expected) - set(value)), sorted(set(value) - set(expected))
        raise ValueError(
            f"{where or 'result'}: expected keys {sorted(expected)}; missing {missing}, unknown {unknown}"
        )
    for name, types in expected.items():
        entry = value[name]
        if not isinstance(entry, types) or (isinstance(entry, bool) and types is not bool):
            raise ValueError(f"{where}.{name}: expected {types}, got {entry!r}".lstrip("."))


def _time(text: str) -> None:
    try:
        zone = datetime.fromisoformat(text).tzinfo
    except ValueError:
        zone = None
    if zone is None:
        raise ValueError(f"created: expected an ISO 8601 time with its zone, got {text!r}")


def _row(row: dict[str, Any], where: str) -> None:
    if row["role"] not in ROLES:
        raise ValueError(f"{where}.role: expected one of {', '.join(map(repr, ROLES))}, got {row['role']!r}")
    named = {name: row[name] for name in ("min", "q1", "median", "q3")}
    times = list(named.values())
    if not all(math.isfinite(t) and t > 0 for t in times) or times != sorted(times):
        raise ValueError(f"{where}: expected 0 < min <= q1 <= median <= q3 in seconds, got {named}")
    if row["rounds"] < MIN_ROUNDS:
        raise ValueError(f"{where}.rounds: expected {MIN_ROUNDS} or more, got {row['rounds']}")
    for peer, target in row["targets"].items():
        if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target < math.inf:
            raise ValueError(f"{where}.targets[{peer!r}]: expected a ratio > 0, got {target!r}")
    for name, note in row["notes"].items():
        if not isinstance(note, (str, int, float)):
            raise ValueError(f"{where}.notes[{name!r}]: expected a number or a text, got {note!r}")


def _no_paths(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for name, entry in value.items():
            _no_paths(entry, f"{where}.{name}".lstrip("."))
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            _no_paths(entry, f"{where}[{i}]")
    elif isinstance(value, str) and _PATH.search(value):
        raise ValueError(f"{where}: expected no file path, got {value!r}")
