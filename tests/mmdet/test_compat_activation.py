"""What activate() finds, refuses and installs; the orders of import each in a process of its own."""

from __future__ import annotations

import importlib.machinery
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import ikd_fast.mmdet  # noqa: F401  activates compat
from ikd_fast.mmdet import compat
from ikd_fast.mmdet.compat import environment

REPO = Path(__file__).parents[2]
# importlib.util.find_spec asks the finders in turn, and takes None from all of them as "not installed".
HIDE_PACKAGE = """
import sys
from importlib.machinery import PathFinder
class Hide(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == {name!r} else PathFinder.find_spec(name, path, target)
sys.meta_path = [Hide if finder is PathFinder else finder for finder in sys.meta_path]
"""


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (*path, REPO))),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )


def install(
    folder: Path, package: str, *distributions: tuple[str, str], init: str = "", version: str = ""
) -> Path:
    """A package as pip would leave it: a folder, and one dist-info for each distribution that owns it."""
    (folder / package).mkdir(parents=True, exist_ok=True)
    (folder / package / "__init__.py").write_text(init)
    (folder / package / "version.py").write_text(f"__version__ = '{version or distributions[0][1]}'\n")
    for name, number in distributions:
        info = folder / f"{name.replace('-', '_')}-{number}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    return folder / package


BOUNDS = (
    "mmcv_minimum_version = '2.0.0rc4'\nmmcv_maximum_version = '2.2.0'\n"
    "mmengine_minimum_version = '0.7.1'\nmmengine_maximum_version = '1.0.0'\n"
)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for site-packages; the three packages are looked up there only."""

    def folder(package: str) -> Path | None:
        return tmp_path / package if (tmp_path / package).is_dir() else None

    monkeypatch.setattr(environment, "package_folder", folder)
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "mmdet", ("mmdet", "3.3.0"), init=BOUNDS)
    install(tmp_path, "mmengine", ("mmengine", "0.10.7"))
    return tmp_path


def lite_only() -> None:
    if compat.activate().mode != "substitutes":
        pytest.skip("mmcv is compiled here: importing mmdet first works")


def test_report_of_this_process() -> None:
    report = compat.activate()
    assert report is compat.activate()
    assert report.versions["mmdet"] == __import__("mmdet").__version__
    assert report.versions["mmcv"] == __import__("mmcv").__version__
    assert report.versions["mmengine"] == __import__("mmengine").__version__
    compiled = environment.compiled_file(Path(__import__("mmcv").__file__).parent) is not None
    assert report.mode == ("compiled" if compiled else "substitutes")
    if not compiled:
        assert report.provider("nms") in ("torchvision", "ikd_fast")
        assert report.provider("sigmoid_focal_loss_forward") == "ikd_fast"
        assert (
            report.provider("roi_align_forward")
            == report.provider("deform_conv_forward")
            == report.provider("nms")
        )
        assert report.provider("softnms") == "ikd_fast"
        assert report.provider("carafe_forward") == "none"
        assert report.reason == "this mmcv has no compiled operators"


def test_same_report_from_every_thread() -> None:
    reports: list[object] = []
    threads = [threading.Thread(target=lambda: reports.append(compat.activate())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == 8
    assert len(set(map(id, reports))) == 1


def test_missing_packages_are_all_named(site: Path) -> None:
    for file in (site / "mmengine").iterdir():
        file.unlink()
    (site / "mmengine").rmdir()
    with pytest.raises(
        compat.CompatError, match=r"needs mmengine and mmcv, .*\n  pip install \"mmdet==3.3.0\""
    ) as found:
        environment.check_environment()
    assert isinstance(found.value, ImportError)


def test_versions_that_fit(site: Path) -> None:
    install(site, "mmcv", ("mmcv-lite", "2.1.0"))
    assert environment.check_environment() == {"mmdet": "3.3.0", "mmengine": "0.10.7", "mmcv": "2.1.0"}


@pytest.mark.parametrize("version", ["2.2.0", "2.2.1", "3.0.0", "1.7.2"])
def test_mmcv_that_mmdet_refuses(site: Path, version: str) -> None:
    install(site, "mmcv", ("mmcv", version))
    with pytest.raises(
        compat.CompatError,
        match=rf"mmdet 3.3.0 expects mmcv >= 2.0.0rc4, < 2.2.0, but mmcv {version} is installed. Run:\n"
        r"  pip uninstall -y mmcv && pip install \"mmcv-lite==2.1.0\"",
    ):
        environment.check_environment()


@pytest.mark.parametrize(
    ("package", "names", "keep"),
    [
        ("mmdet", ("onedl-mmdetection",), "mmdet==3.3.0"),
        ("mmengine", ("mmengine-lite",), "mmengine==0.10.7"),
        ("mmengine", ("onedl-mmengine",), "mmengine==0.10.7"),
        ("mmcv", ("mmcv-lite", "onedl-mmcv-cu128-torch2-8"), "mmcv-lite==2.1.0"),
    ],
)
def test_onedl_and_openmmlab_over_each_other(
    site: Path, package: str, names: tuple[str, ...], keep: str
) -> None:
    install(site, "mmcv", ("mmcv", "2.1.0"))
    # A second installation overwrites files of the first, whose dist-info stays.
    install(site, package, *((name, "2.1.0") for name in names), init=BOUNDS, version="2.1.0")
    with pytest.raises(compat.CompatError) as found:
        environment.check_environment()
    message = str(found.value)
    assert f"installed over each other in {site / package}: their files are mixed" in message
    for name in (package, *names):
        assert f"{name} " in message.split("are installed")[0] + " "
        assert name in message.split("pip uninstall -y ")[1].splitlines()[0].split()
    assert message.endswith(f'pip install "{keep}"')


def test_a_package_with_a_longer_name_is_no_second_owner(site: Path) -> None:
    install(site, "mmcv", ("mmcv-lite", "2.1.0"))
    install(site, "mmdet3d", ("mmdet3d", "1.4.0"))
    install(site, "onedl_mmpretrain", ("onedl-mmpretrain", "1.3.6"))
    assert environment.check_environment()["mmdet"] == "3.3.0"


@pytest.mark.parametrize("other", ["mmcv", "onedl-mmcv"])
def test_two_distributions_over_each_other(site: Path, other: str) -> None:
    install(site, "mmcv", ("mmcv-lite", "2.1.0"), (other, "2.1.0"))
    with pytest.raises(
        compat.CompatError,
        match=rf"{other} 2.1.0.* installed over each other.*\n  pip uninstall -y .*{other}",
    ):
        environment.check_environment()


def test_two_distributions_in_two_folders_are_fine(
    site: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    install(site, "mmcv", ("mmcv", "2.1.0"))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    install(elsewhere, "mmcv", ("mmcv-lite", "2.0.1"))
    sys.path.append(str(elsewhere))
    try:
        assert environment.check_environment()["mmcv"] == "2.1.0"
    finally:
        sys.path.remove(str(elsewhere))


@pytest.mark.slow
def test_missing_mmdet_end_to_end() -> None:
    result = python(HIDE_PACKAGE.format(name="mmdet") + "import ikd_fast.mmdet")
    assert result.returncode == 1
    assert "CompatError: ikd_fast.mmdet needs mmdet, which cannot be found" in result.stderr
    assert environment.INSTALL in result.stderr


@pytest.mark.slow
def test_mmdet_imported_first_and_failed() -> None:
    lite_only()
    result = python("try:\n    import mmdet.models\nexcept ImportError:\n    pass\nimport ikd_fast.mmdet")
    assert result.returncode == 1
    assert "was imported before ikd_fast.mmdet and failed half way" in result.stderr
    assert "python -m ikd_fast.mmdet SCRIPT ARGS..." in result.stderr


@pytest.mark.slow
def test_mmdet_imported_first_without_its_operators_is_fine() -> None:
    # As mmdet's own tools/train.py does before it reads the config whose custom_imports bring ikd_fast.mmdet.
    result = python(
        "import mmdet.utils, mmdet.registry, ikd_fast.mmdet, mmdet.models; print(mmdet.models.__name__)"
    )
    assert result.stdout == "mmdet.models\n", result.stderr


@pytest.mark.slow
def test_what_does_not_load_is_replaced_aloud(tmp_path: Path) -> None:
    """In one process: compiled operators and a torchvision built for another torch, and no pkg_resources."""
    lite_only()
    import mmcv

    (tmp_path / "mmcv").mkdir()
    for entry in Path(mmcv.__file__).parent.iterdir():
        if entry.name != "__pycache__":
            (tmp_path / "mmcv" / entry.name).symlink_to(entry)
    (tmp_path / "mmcv" / f"_ext{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    message = "operator torchvision::nms does not exist"
    install(tmp_path, "torchvision", ("torchvision", "0.1"), init=f"raise RuntimeError({message!r})\n")
    code = HIDE_PACKAGE.format(name="pkg_resources") + (
        "import torch\n"
        "from ikd_fast.mmdet import compat\n"
        "from ikd_fast.mmdet.compat.operators import find_torchvision\n"
        "from mmcv.ops import nms\n"
        "boxes = torch.tensor([[0., 0, 4, 4], [0, 0, 4, 5], [9, 9, 12, 12]])\n"
        "report = compat.activate()\n"
        "print(report.provider('nms'), nms(boxes, torch.tensor([.1, .9, .5]), .5)[1].tolist())\n"
        "print(find_torchvision()[1])\n"
        "print(report.mode, report.reason)\n"
    )
    result = python(code, tmp_path)
    lines = result.stdout.splitlines()
    assert lines[:2] == [
        "ikd_fast [1, 2]",
        f"torchvision does not work with this torch: RuntimeError: {message}",
    ], result.stderr
    assert lines[2].startswith("substitutes the compiled operators do not load: ImportError")
    assert "mmcv was built for another torch" in result.stderr
    assert "RuntimeWarning: mmengine imports pkg_resources" in result.stderr
    assert 'pip install "setuptools<81"' in result.stderr
