"""One build of the source distribution and of the wheel made from it, and an environment that holds nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

_NOT_SOURCE = shutil.ignore_patterns(
    ".git",
    ".venv*",
    "runs",
    "work_dirs",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    ".benchmarks",
)


@dataclass(frozen=True)
class Artefacts:
    """Where the two files lie, and the copy of the tree they were built from."""

    source: Path
    wheel: Path
    sdist: Path


def run(args: list[str | Path], **kwargs) -> subprocess.CompletedProcess[str]:
    """Run a command, showing its output when it fails."""
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{args} ended in {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def artefacts(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    """`python -m build` on a copy, so that the checkout stays clean; the wheel is made from the sdist."""
    work = tmp_path_factory.mktemp("dist")
    source = work / "source"
    shutil.copytree(repo_root, source, ignore=_NOT_SOURCE)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", work / "out", source], cwd=work)
    (wheel,) = (work / "out").glob("*.whl")
    (sdist,) = (work / "out").glob("*.tar.gz")
    return Artefacts(source, wheel, sdist)


def _with_dependencies(*names: str) -> set[str]:
    """The installed distributions these need, themselves included, without extras."""
    found: set[str] = set()
    queue = list(names)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in found:
            continue
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:  # a requirement of another platform
            continue
        found.add(name)
        parsed = [Requirement(text) for text in requires]
        queue += [r.name for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="session")
def bare_env(artefacts: Artefacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, torch, numpy, what those two need, and nothing else."""
    home = tmp_path_factory.mktemp("bare") / "env"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).stdout.strip())
    for name in _with_dependencies("torch", "numpy"):
        dist = distribution(name)
        for top in {file.parts[0] for file in dist.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            link = site / top
            if not link.exists():
                os.symlink(dist.locate_file(top), link)
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--no-deps",
            "--no-index",
            artefacts.wheel,
        ]
    )
    return python
