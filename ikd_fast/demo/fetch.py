"""Get the eight files of deepforest 2.1.0 that the demo uses, from PyPI, a wheel or a folder, and check each of them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from ikd_fast.demo.errors import DemoError

PACKAGE = "deepforest==2.1.0"
WHEEL_NAME = "deepforest-2.1.0-py3-none-any.whl"
WHEEL_SHA256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
FOLDER = "deepforest/data"
LICENCE = "deepforest-2.1.0.dist-info/licenses/LICENSE"
FILES = {
    "2019_YELL_2_528000_4978000_image_crop2.png": "a9bdb0f4447fdd899d22f567e0e20ba8320c5413b2ad0cd0ac8d9f3b6e0f9767",
    "2019_YELL_2_528000_4978000_image_crop2.xml": "bd431af6a5086d721eb731b22f5ea28cd8a8eab06883efc1c665391acbc68e11",
    "2019_YELL_2_541000_4977000_image_crop.png": "178e58a23cc2642226a364a30f71bd9258ddc1b012c826f12250914a90c7a131",
    "2019_YELL_2_541000_4977000_image_crop.xml": "cefe4b96888bacbf8af1674f000082e549aa707aa6590d545effb23e43f26631",
    "OSBS_029.png": "d9477c6a00e4902c7bee487d4c5582c3b8b9a2f77f3908a29628b816b291e6ee",
    "OSBS_029.xml": "1f68c4011d7b351c29ca755072e77f3d16e6fd1f995bd05a9dd4eb952b55373c",
    "SOAP_061.png": "256508f1a62149bec4a80879077a865caf50e8cace095e6564c76befa480d424",
    "SOAP_061.xml": "4833280af75fd9c47965a93e38945282835e9e725cac412bdb9469d63480947c",
}
ELSEWHERE = (
    f"On a machine with a network: pip download --no-deps {PACKAGE}\n"
    f"then here: ikd-fast demo --wheel {WHEEL_NAME}\n"
    "or, with the wheel unpacked: ikd-fast demo --source FOLDER (the folder that holds 2019_YELL_2_*.png)"
)


def cache_dir() -> Path:
    """``$IKD_FAST_CACHE`` or ``~/.cache/ikd_fast``."""
    return Path(os.environ.get("IKD_FAST_CACHE") or Path.home() / ".cache" / "ikd_fast")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_source(*, wheel: Path | None = None, source: Path | None = None) -> dict[str, bytes]:
    """The contents of :data:`FILES` by name, each with the expected SHA-256.

    Args:
        wheel: the deepforest 2.1.0 wheel; by default taken from the cache or downloaded with pip (20 MB).
        source: a folder with the files, read instead of a wheel.

    Raises:
        DemoError: both given, a file missing or changed, or no network.
    """
    if wheel is not None and source is not None:
        raise DemoError("give --wheel or --source, not both", usage=True)
    if source is not None:
        return _from_folder(source)
    return _from_wheel(wheel if wheel is not None else _download())


def _from_folder(source: Path) -> dict[str, bytes]:
    for folder in (source, source / "data", source / FOLDER):
        if (folder / "OSBS_029.png").is_file():
            missing = [name for name in FILES if not (folder / name).is_file()]
            if missing:
                raise DemoError(f"{folder} lacks {', '.join(missing)} of {PACKAGE}'s {FOLDER}")
            return {name: _checked(name, (folder / name).read_bytes(), str(folder)) for name in FILES}
    raise DemoError(
        f"--source {source}: expected a folder with {', '.join(FILES)}, found none of them there", usage=True
    )


def _from_wheel(wheel: Path) -> dict[str, bytes]:
    if not wheel.is_file():
        raise DemoError(f"--wheel {wheel}: no such file\n{ELSEWHERE}", usage=True)
    found = sha256(wheel.read_bytes())
    if found != WHEEL_SHA256:
        raise DemoError(
            f"{wheel} is not {WHEEL_NAME}: expected sha256 {WHEEL_SHA256}, found {found}. Delete it and fetch it again.\n"
            + ELSEWHERE
        )
    with zipfile.ZipFile(wheel) as archive:
        return {name: _checked(name, archive.read(f"{FOLDER}/{name}"), str(wheel)) for name in FILES}


def _checked(name: str, data: bytes, where: str) -> bytes:
    found = sha256(data)
    if found != FILES[name]:
        raise DemoError(f"{where}/{name}: expected sha256 {FILES[name]} ({PACKAGE}), found {found}")
    return data


def _download() -> Path:
    cache = cache_dir()
    wheel = cache / WHEEL_NAME
    if wheel.is_file() and sha256(wheel.read_bytes()) == WHEEL_SHA256:
        return wheel
    wheel.unlink(missing_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(cache), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not wheel.is_file():
        last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:] or [
            "pip said nothing"
        ]
        raise DemoError(
            f"the demo photographs could not be downloaded ({PACKAGE}, 20 MB): {last[0].strip()}\n{ELSEWHERE}"
        )
    return wheel
