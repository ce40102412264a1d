"""What can be done to a directory of records outside training: summed up, checked, made smaller, deleted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ikd_fast.attack.memory.forecast import human

from .directory import SUFFIX, DirectoryStore
from .layout import Unreadable
from .manifest import NAME, Manifest

CPU = torch.device("cpu")


@contextmanager
def opened(directory: Path, say: Callable[[str], None] | None = None) -> Iterator[DirectoryStore]:
    """A memory that is there, for this process alone. What is no shard is set aside, and ``say`` told.

    Raises:
        ValueError: there is none.
        RuntimeError: a run is using it.
        OSError: it cannot be opened.
    """
    if not directory.exists():
        raise ValueError(f"{directory}: no such directory")
    if not directory.is_dir():
        raise ValueError(f"{directory}: expected a directory of kept perturbations, got a file")
    if Manifest.read(directory) is None:
        raise ValueError(f"{directory}: expected a perturbation memory, a directory with {NAME}")
    store = DirectoryStore(directory)
    if say is not None:
        store.say = say
    store.open()
    try:
        yield store
    finally:
        store.close()


def summary(directory: Path) -> dict[str, Any]:
    """Settings, images, bytes that records take and files have, visits and steps."""
    with opened(directory) as store:
        records = list(store.records())
        files = list(directory.glob(f"*{SUFFIX}"))
        visits, steps = [r.visits for r in records], [r.step for r in records]
        return {
            "directory": str(directory),
            "settings": dict(store.settings or {}),
            "images": len(records),
            "bytes": store.nbytes,
            "file_bytes": sum(path.stat().st_size for path in files),
            "shards": len(files),
            "set_aside": sorted(path.name for path in directory.glob("*.aside")),
            "visits": {"mean": sum(visits) / len(visits), "most": max(visits)} if visits else None,
            "steps": {"first": min(steps), "last": max(steps)} if steps else None,
        }


def verify(directory: Path) -> dict[str, Any]:
    """Read every record, contents and all; ``damaged`` has a line for each that cannot be, and for each file that is no shard."""
    damaged: list[str] = []
    whole = 0
    with opened(directory, damaged.append) as store:
        for shard in store.shards_open:
            for id in list(shard.ids()):
                try:
                    whole += shard.get(id) is not None
                except (Unreadable, OSError) as error:
                    damaged.append(str(error))
        found = len(damaged) + store.counts["damaged"]
    return {"directory": str(directory), "whole": whole, "damaged": damaged, "count": found}


def compact(directory: Path) -> dict[str, int]:
    """Write every shard anew without the room that nothing uses, and without records that cannot be read.

    A shard is replaced when its successor is whole: stopped at any moment, every record is there.

    Returns:
        ``before`` and ``after``: bytes of the files; ``dropped`` records.
    """
    dropped = 0
    with opened(directory) as store:
        before = _file_bytes(directory)
        for shard in store.shards_open:
            successor = shard.path.with_name(f".{shard.path.name}.new")
            successor.unlink(missing_ok=True)
            dropped += shard.copy_to(successor)
            os.replace(successor, shard.path)
    return {"before": before, "after": _file_bytes(directory), "dropped": dropped}


def delete(directory: Path) -> int:
    """Remove the memory's files, and the directory if nothing else is in it.

    Returns:
        bytes that were given back.
    """
    with opened(directory):
        ours = [
            *directory.glob(f"*{SUFFIX}"), *directory.glob("*.aside"), *directory.glob(f".*{SUFFIX}.new"),
            directory / NAME, directory / "lock",
        ]  # fmt: skip
        freed = sum(path.stat().st_size for path in ours)
        for path in ours:
            path.unlink()
    if not any(directory.iterdir()):
        directory.rmdir()
    return freed


def _file_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob(f"*{SUFFIX}"))


def told(found: dict[str, Any]) -> str:
    """What one of these functions found, in lines."""
    lines = []
    for name, value in found.items():
        if name == "count":
            name = "damaged in all"
        if isinstance(value, dict):
            value = ", ".join(
                f"{key} {human(v) if 'byte' in key else f'{v:g}' if isinstance(v, float) else v}"
                for key, v in value.items()
            )
        elif isinstance(value, list):
            value = "\n    ".join(["", *value]) if value else "none"
        elif isinstance(value, int) and name in ("bytes", "file_bytes", "before", "after", "freed"):
            value = human(value)
        lines.append(f"{name.replace('_', ' ')}: {value}")
    return "\n".join(lines)
