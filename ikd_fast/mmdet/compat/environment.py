"""What is installed under the names mmdet, mmengine and mmcv, checked before any of them is imported."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path

INSTALL = 'pip install "mmdet==3.3.0" "mmengine==0.10.7" "mmcv-lite==2.1.0" "setuptools<81"'
INSTALL_MMCV = 'pip install "mmcv-lite==2.1.0"'
INSTALL_MMENGINE = 'pip install "mmengine==0.10.7"'
INSTALL_MMDET = 'pip install "mmdet==3.3.0"'
INSTALL_SETUPTOOLS = 'pip install "setuptools<81"'

# Distributions that install the same import package.
OWNERS = {
    "mmdet": ("mmdet", "onedl-mmdetection"),
    "mmengine": ("mmengine", "mmengine-lite", "onedl-mmengine"),
    "mmcv": ("mmcv", "mmcv-lite", "mmcv-full", "onedl-mmcv"),
}


class CompatError(ImportError):
    """The mmdet stack is missing, mismatched or was imported too early; the message says what to run."""


def package_folder(package: str) -> Path | None:
    """Folder ``package`` would be imported from, without importing it; None when it is not installed."""
    module = sys.modules.get(package)
    if module is not None and getattr(module, "__file__", None):
        return Path(str(module.__file__)).parent
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module put in sys.modules by hand has no spec
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _constant(path: Path, name: str) -> str | None:
    """The string literal assigned to ``name`` in a source file that is not executed."""
    if not path.is_file():
        return None
    found = re.search(rf"^{name}\s*=\s*['\"]([^'\"]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else None


def _variants(package: str, folder: Path) -> list[str]:
    """Builds of an owner under a longer name, such as ``onedl-mmcv-cu128-torch2-8``, beside the package's folder."""
    known = tuple(name.replace("-", "_") for name in OWNERS.get(package, (package,)))
    stems = {path.name.split("-")[0].lower() for path in folder.parent.glob("*.dist-info")}
    longer = sorted(stem for stem in stems if stem.startswith("onedl_") and stem not in known)
    return [stem.replace("_", "-") for stem in longer if stem.startswith(tuple(f"{name}_" for name in known))]


def owners_in(package: str, folder: Path) -> dict[str, str]:
    """Distributions, with versions, that own ``package`` in the folder it is imported from."""
    owners = {}
    for name in (*OWNERS.get(package, (package,)), *_variants(package, folder)):
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if Path(str(distribution.locate_file(package))).resolve() == folder.resolve():
            owners[name] = distribution.version
    return owners


def source_version(package: str) -> str | None:
    """Version in the sources that an import would take, else that of an installed distribution."""
    folder = package_folder(package)
    if folder is None:
        return None
    version = _constant(folder / "version.py", "__version__") or _constant(
        folder / "__init__.py", "__version__"
    )
    if version is None:
        version = next(iter(owners_in(package, folder).values()), None)
    return version


def compiled_file(folder: Path) -> Path | None:
    """The compiled operators inside an mmcv folder, if it has any."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_ext{suffix}"
        if path.is_file():
            return path
    return None


def _release(version: str) -> tuple[int, ...]:
    """``"2.0.0rc4"`` -> (2, 0, 0): mmdet's bounds are wide enough to ignore what follows."""
    numbers = [int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3]]
    return tuple(numbers + [0] * (3 - len(numbers)))


def _check_bound(package: str, version: str, mmdet_folder: Path, mmdet_version: str, remedy: str) -> None:
    source = mmdet_folder / "__init__.py"
    lowest = _constant(source, f"{package}_minimum_version")
    end = _constant(source, f"{package}_maximum_version")
    if (lowest and _release(version) < _release(lowest)) or (end and _release(version) >= _release(end)):
        raise CompatError(
            f"mmdet {mmdet_version} expects {package} >= {lowest}, < {end}, but {package} {version} is installed. "
            f"Run:\n  {remedy}"
        )


def check_environment() -> dict[str, str]:
    """Versions of mmdet, mmengine and mmcv as installed.

    Raises:
        CompatError: one is missing, two distributions share one folder, or mmdet would refuse the version found.
    """
    folders = {package: package_folder(package) for package in OWNERS}
    missing = [package for package, folder in folders.items() if folder is None]
    if missing:
        raise CompatError(
            f"ikd_fast.mmdet needs {' and '.join(missing)}, which cannot be found. Run:\n  {INSTALL}"
        )
    found: dict[str, Path] = {package: folder for package, folder in folders.items() if folder is not None}
    for package, keep in (("mmcv", INSTALL_MMCV), ("mmengine", INSTALL_MMENGINE), ("mmdet", INSTALL_MMDET)):
        owners = owners_in(package, found[package])
        if len(owners) > 1:
            listed = " and ".join(f"{name} {version}" for name, version in owners.items())
            raise CompatError(
                f"{listed} are installed over each other in {found[package]}: their files are mixed. Run:\n"
                f"  pip uninstall -y {' '.join(owners)}\n  {keep}"
            )
    versions = {package: source_version(package) or "unknown" for package in OWNERS}
    for package, remedy in (
        (
            "mmcv",
            f"pip uninstall -y {' '.join(owners_in('mmcv', found['mmcv']) or ['mmcv'])} && {INSTALL_MMCV}",
        ),
        ("mmengine", INSTALL_MMENGINE),
    ):
        if versions[package] != "unknown":
            _check_bound(package, versions[package], found["mmdet"], versions["mmdet"], remedy)
    return versions


def pkg_resources_problem() -> str | None:
    """What fails without ``pkg_resources`` (gone from setuptools 81 on), or None when it is there."""
    if importlib.util.find_spec("pkg_resources") is not None:
        return None
    try:
        found = f"setuptools {metadata.version('setuptools')} has none"
    except metadata.PackageNotFoundError:
        found = "setuptools is not installed"
    return (
        f"mmengine imports pkg_resources to resolve paths such as 'mmdet::retinanet/...', but {found}. "
        f"Run:\n  {INSTALL_SETUPTOOLS}"
    )
