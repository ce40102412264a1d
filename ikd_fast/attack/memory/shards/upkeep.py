"""What can be done to a directory of records outside training: summed up, checked, made smaller, deleted."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ikd_fast.attack.memory.forecast import human

from .directory import SUFFIX, DirectoryStore, shard_file
from .layout import Unreadable
from .manifest import NAME, Manifest
from .run_lock import RunLock
from .shard import Shard


@dataclass(frozen=True)
class Looked:
    """A memory's files as they are: its ``shards``, and a line for each file that is to be one and is ``foreign``."""

    manifest: Manifest
    shards: list[Shard]
    foreign: list[str]


def manifest_of(directory: Path) -> Manifest:
    """Of a memory that is there.

    Raises:
        ValueError: there is none, or its manifest cannot be read.
    """
    if not directory.exists():
        raise ValueError(f"{directory}: no such directory")
    if not directory.is_dir():
        raise ValueError(f"{directory}: expected a directory of kept perturbations, got a file")
    manifest = Manifest.read(directory)
    if manifest is None:
        raise ValueError(f"{directory}: expected a perturbation memory, a directory with {NAME}")
    return manifest


@contextmanager
def opened(directory: Path) -> Iterator[DirectoryStore]:
    """A memory that is there, for this process alone and put in order: what is no shard is set aside.

    Raises:
        ValueError: there is none.
        RuntimeError: a run is using it.
        OSError: it cannot be opened.
    """
    manifest = manifest_of(directory)
    store = DirectoryStore(directory, shards=manifest.shards, capacity=manifest.capacity)
    store.open()
    try:
        yield store
    finally:
        store.close()


@contextmanager
def looked_at(directory: Path) -> Iterator[Looked]:
    """As :func:`opened`, and nothing but the lock's own file is changed."""
    manifest = manifest_of(directory)
    lock = RunLock(directory / "lock", uuid.uuid4().hex)
    looked = Looked(manifest, [], [])
    try:
        for number in range(manifest.shards):
            path, head = shard_file(directory, manifest, number)
            try:
                looked.shards.append(Shard(path, head, new=False))
            except Unreadable as error:
                looked.foreign.append(f"{path}: {error}")
            except FileNotFoundError:
                continue  # made when it is needed
        yield looked
    finally:
        for shard in looked.shards:
            shard.close()
        lock.release()


def summary(directory: Path) -> dict[str, Any]:
    """Settings, images, bytes that records take and files have, visits and steps."""
    with looked_at(directory) as there:
        records = [record for shard in there.shards for record in shard.records()]
        files = list(directory.glob(f"*{SUFFIX}"))
        visits, steps = [r.visits for r in records], [r.step for r in records]
        return {
            "directory": str(directory),
            "settings": dict(there.manifest.settings or {}),
            "images": len(records),
            "bytes": sum(shard.nbytes for shard in there.shards),
            "file_bytes": sum(path.stat().st_size for path in files),
            "shards": len(files),
            "foreign": there.foreign,
            "set_aside": sorted(path.name for path in directory.glob("*.aside")),
            "visits": {"mean": sum(visits) / len(visits), "most": max(visits)} if visits else None,
            "steps": {"first": min(steps), "last": max(steps)} if steps else None,
        }


def verify(directory: Path) -> dict[str, Any]:
    """Read every record, contents and all; ``damaged`` has a line for each that cannot be, and for each file that is no shard."""
    whole = 0
    with looked_at(directory) as there:
        damaged = list(there.foreign)
        for shard in there.shards:
            for id in list(shard.ids()):
                try:
                    whole += shard.get(id) is not None
                except (Unreadable, OSError) as error:
                    damaged.append(str(error))
    return {"directory": str(directory), "whole": whole, "damaged": damaged, "count": len(damaged)}


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
