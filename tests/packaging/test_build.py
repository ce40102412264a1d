"""The wheel and the sdist hold every file they should, and work in an environment with torch and numpy alone."""

from __future__ import annotations

import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# source folder -> where its modules are imported
HOMES = {"ikd_fast": "ikd_fast", "kernels": "ikd_fast/kernels", "configs": "ikd_fast/configs"}


def _expected(source: Path) -> set[str]:
    """Every module, config, marker and asset of the tree, by its path inside the wheel."""
    found = set()
    for folder, home in HOMES.items():
        for path in (source / folder).rglob("*"):
            asset = path.parent.name == "assets" and path.is_file()
            if path.suffix == ".py" or path.name == "py.typed" or asset:
                found.add(f"{home}/{path.relative_to(source / folder).as_posix()}")
    return found


def test_wheel_holds_the_tree_and_nothing_else(artefacts) -> None:
    with zipfile.ZipFile(artefacts.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == _expected(artefacts.source)
    # what users reach for by name, so that an empty tree cannot pass
    assert {
        "ikd_fast/py.typed",
        "ikd_fast/kernels/reference/philox.py",
        "ikd_fast/assets/demo_teacher.safetensors",
        "ikd_fast/configs/demo/teacher.py",
        "ikd_fast/mmdet/__main__.py",
    } <= names


def test_shipped_teacher_is_small(artefacts) -> None:
    with zipfile.ZipFile(artefacts.wheel) as wheel:
        size = wheel.getinfo("ikd_fast/assets/demo_teacher.safetensors").file_size
    assert 1e5 < size <= 8 * 2**20


def test_sdist_can_be_developed_from(artefacts) -> None:
    with tarfile.open(artefacts.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = [
        ".ci/run",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "README.md",
    ]
    wanted += [
        "pyproject.toml",
        "setup.py",
        "requirements/dev.txt",
        "requirements/torch.txt",
        "docs/support.md",
    ]
    wanted += [
        "configs/demo/teacher.py",
        "kernels/reference/philox.py",
        "tests/conftest.py",
        "benchmarks/conftest.py",
    ]
    assert not set(wanted) - names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_wheel_metadata(artefacts) -> None:
    with zipfile.ZipFile(artefacts.wheel) as wheel:
        (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
        metadata = wheel.read(f"{info}/METADATA").decode()
        entry_points = wheel.read(f"{info}/entry_points.txt").decode()
        licence = wheel.read(f"{info}/licenses/LICENSE").decode()
    requires = [line[15:] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    assert sorted(r for r in requires if "extra ==" not in r) == ["numpy>=1.26", "torch>=2.6"]
    extras = {line[16:] for line in metadata.splitlines() if line.startswith("Provides-Extra: ")}
    assert extras == {"all", "bench", "cli", "dali", "dev", "kornia", "mmdet", "triton"}
    assert "Requires-Python: >=3.10" in metadata
    assert "ikd-fast = ikd_fast.__main__:main" in entry_points
    assert "Apache License" in licence
    assert "Version 2.0" in licence


USE = """
import importlib.util, pathlib, sys
import torch
import ikd_fast, ikd_fast.kernels, ikd_fast.configs
from ikd_fast import AdaptiveFreqAug, AdvFeatureLoss, FGDLoss, IKD, MGDLoss, OnlineDIFGSM
from ikd_fast.kernels import pyramid_l2

for module in (ikd_fast, ikd_fast.kernels, ikd_fast.configs):
    assert pathlib.Path(module.__file__).is_relative_to(sys.prefix), module.__file__
for name in ("mmdet", "mmengine", "typer", "rich", "scipy", "cv2", "matplotlib"):
    assert importlib.util.find_spec(name) is None, f"{name} is visible: the environment is not bare"
assert (pathlib.Path(ikd_fast.configs.__file__).parent / "demo" / "teacher.py").is_file()

image = torch.full((3, 64, 64), 100, dtype=torch.uint8)
boxes = torch.tensor([[4.0, 4.0, 20.0, 20.0]])
target = {"boxes": boxes, "labels": torch.tensor([0])}
images, targets = AdaptiveFreqAug(noise_prob=1.0)([image], [target], image_ids=[1], epoch=0)
assert torch.equal(targets[0]["boxes"], boxes)  # a small box: noise, nothing moves
assert 10 < images[0].float().std() < 30  # 20.4 grey levels of noise on a flat image
print("used from", sys.prefix)
"""


def test_wheel_works_beside_torch_and_numpy_alone(bare_env, tmp_path) -> None:
    done = subprocess.run([bare_env, "-I", "-c", USE], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "used from" in done.stdout


def test_command_names_the_extra_it_needs(bare_env, tmp_path) -> None:
    command = bare_env.with_name("ikd-fast")
    done = subprocess.run([command, "doctor"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        'ikd-fast needs typer, which is not installed. Write: pip install "ikd_fast[cli]"'
    )
