"""What the house files say about each other: one version, one list of commands, pins that hold."""

from __future__ import annotations

import ast
import re
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ikd_fast


def _pins(path: Path) -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def test_one_version(repo_root: Path) -> None:
    declared = re.search(r'^version = "(.+)"$', (repo_root / "pyproject.toml").read_text(), re.M)[1]
    cited = re.search(r"^version: (.+)$", (repo_root / "CITATION.cff").read_text(), re.M)[1]
    assert ikd_fast.__version__ == declared == cited
    assert f"## [{declared}]" in (repo_root / "CHANGELOG.md").read_text()


def test_ci_runs_the_commands_of_the_readme(repo_root: Path) -> None:
    made = re.findall(r"^section (make [a-z-]+)$", (repo_root / ".ci" / "run").read_text(), re.M)
    commands = "make test, make configs, make distributed, make kernels, make dali, make lint, make quick-demo".split(
        ", "
    )
    assert made == ["make venv", *commands]
    readme = (repo_root / "README.md").read_text()
    missing = [command for command in ["make demo", *commands] if command not in readme]
    assert not missing, f"the README does not name {missing}"


def test_ci_script_is_executable_and_parses(repo_root: Path) -> None:
    script = repo_root / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(
    "target", ["demo", "quick-demo", "test", "configs", "distributed", "kernels", "dali", "lint", "bench"]
)
def test_every_target_makes_the_environment_first(repo_root: Path, tmp_path: Path, target: str) -> None:
    """With no `.venv`, the plan of each target starts by making one and pins torch before the rest; mmcv is never built."""
    done = subprocess.run(
        ["make", "-n", target, f"VENV={tmp_path / 'none'}"],
        cwd=repo_root,
        capture_output=True,
        text=True,
        check=True,
    )
    plan = done.stdout
    steps = [
        "-m venv",
        "requirements/torch.txt",
        "install --disable-pip-version-check --quiet -r requirements/dev.txt",
        "--editable .",
    ]
    at = [plan.find(step) for step in steps]
    assert -1 not in at
    assert at == sorted(at)
    assert "--no-deps --no-build-isolation" in plan


def test_old_python_is_refused_by_name(repo_root: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.9.2"\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "test", f"PY={old}", f"VENV={tmp_path / 'none'}"],
        cwd=repo_root,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "needs Python 3.10 or newer" in done.stdout
    assert "Python 3.9.2" in done.stdout
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_every_requirement_is_pinned_once_for_each_python(repo_root: Path, python: str) -> None:
    pins = _pins(repo_root / "requirements" / "dev.txt") + _pins(repo_root / "requirements" / "torch.txt")
    names = [r.name for r in pins if r.marker is None or r.marker.evaluate({"python_version": python})]
    assert len(names) == len(set(names))
    assert {"torch", "numpy", "mmdet", "mmcv-lite", "pytest", "ruff", "mypy"} <= set(names)
    assert all(len(r.specifier) == 1 and str(r.specifier).startswith("==") for r in pins)
    assert "mmcv" not in names  # the compiled one takes a quarter of an hour to build


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_dali_is_pinned_beside_the_other_pins(repo_root: Path, python: str) -> None:
    """Installed with --no-deps: what both files had would be there twice, what neither has would be missing."""
    here = {"python_version": python, "platform_system": "Linux", "platform_machine": "x86_64"}
    dali, dev = (
        {r.name: r for r in _pins(repo_root / "requirements" / f"{name}.txt") if not r.marker or r.marker.evaluate(here)}
        for name in ("dali", "dev")
    )  # fmt: skip
    assert all(str(r.specifier).startswith("==") for r in dali.values())
    assert not set(dali) & set(dev)
    # DALI's own list of what it needs, where it is installed; nvimgcodec's extras are decoders for a GPU.
    wheel = "nvidia-dali-cuda120"
    try:
        needed = [Requirement(text) for text in requires(wheel) or []]
    except PackageNotFoundError:
        needed = [Requirement(name) for name in ("six", "packaging", "numpy", "libcst")]
    for need in needed:
        pinned = {**dali, **dev}[need.name]
        (version_of,) = pinned.specifier
        assert need.specifier.contains(version_of.version), (need, pinned)


def test_mapped_folders_are_never_imported_by_their_own_names(repo_root: Path) -> None:
    """`import kernels` from the root would make a second copy of every module, registries and all."""
    found = []
    files = [
        p
        for folder in ("ikd_fast", "kernels", "configs", "tests", "benchmarks")
        for p in (repo_root / folder).rglob("*.py")
    ]
    assert len(files) > 20
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            found += [
                f"{path}:{node.lineno}" for name in names if name.partition(".")[0] in ("kernels", "configs")
            ]
    assert not found


def test_this_environment_has_the_pinned_mmdet_lane() -> None:
    """The extra `mmdet` and the pins must agree on the three packages whose versions the adapters rely on."""
    for name, wanted in {"mmdet": "3.3.0", "mmengine": "0.10.7", "mmcv-lite": "2.1.0"}.items():
        assert version(name) == wanted
