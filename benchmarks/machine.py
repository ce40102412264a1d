"""Facts that a figure needs beside it: machine, versions, threads. No host names and no paths."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = [
    "torch",
    "triton",
    "numpy",
    "ikd_fast",
    "pytest-benchmark",
    "mmdet",
    "mmengine",
    "mmcv-lite",
    "opencv-python",
    "imagecorruptions",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "kornia",
    "kornia-rs",
    "albumentations",
    "albucore",
    "torchattacks",
    "triton-augment",
]


def versions() -> dict[str, str]:
    """Python and whichever of ``PACKAGES`` are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(cpu: str, load: float | None = None) -> dict[str, Any]:
    """What the benchmark ran on. ``cpu``: the processor's name; ``load``: average before the run, default: of now."""
    import torch

    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(pages * page / 2**30, 1),
        "system": platform.system(),
        "arch": platform.machine(),
        "load": round(os.getloadavg()[0], 2) if load is None else load,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def commit(given: str | None = None) -> dict[str, Any]:
    """The checkout's commit, and whether it has changes; ``given`` goes first."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        found = git("rev-parse", "HEAD")
        return {"id": given or found or "unknown", "dirty": bool(git("status", "--porcelain"))}
    except OSError:
        return {"id": given or "unknown", "dirty": False}


def slug(facts: dict[str, Any]) -> str:
    """Folder name of a machine.

    >>> slug({"cpu": "AMD EPYC 7B13", "cores": 2, "gpu": None})
    'amd-epyc-7b13-2-cores'
    >>> slug({"cpu": "Xeon", "cores": 16, "gpu": "NVIDIA H200"})
    'nvidia-h200'
    """
    name = facts["gpu"] or f"{facts['cpu']} {facts['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
