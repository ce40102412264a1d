"""How much host memory a process may still take."""

from __future__ import annotations

import os
from pathlib import Path

UNLIMITED = 1 << 60
"""cgroup v1 writes a huge number where nothing is limited."""


def available_bytes(proc: str | Path = "/proc", cgroup: str | Path = "/sys/fs/cgroup") -> int | None:
    """Free memory of the machine or of this process's control group, whichever is less; None where neither can be read.

    Memory that holds cached files counts as free.
    """
    found = [_machine(Path(proc)), _group(Path(proc), Path(cgroup))]
    return min((v for v in found if v is not None), default=None)


def _machine(proc: Path) -> int | None:
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _group(proc: Path, root: Path) -> int | None:
    """What the tightest group above this process leaves."""
    left = []
    for folder, limit, used, cached in _folders(proc, root):
        total, taken = _number(folder / limit), _number(folder / used)
        if total is not None and taken is not None and total < UNLIMITED:
            left.append(max(0, total - taken + _cached(folder / "memory.stat", cached)))
    return min(left, default=None)


def _folders(proc: Path, root: Path) -> list[tuple[Path, str, str, str]]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may be the host's; then only the root of what is mounted is there.
        folder = top / path.lstrip("/")
        found += [(place, *names) for place in (folder, *folder.parents) if place.is_relative_to(top)]
    return found


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cached(file: Path, key: str) -> int:
    try:
        rows = dict(line.split() for line in file.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(rows.get(key, 0))
