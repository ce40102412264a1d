"""A memory of files that fails under a Runner: training goes on, one warning says so, and the last line has the counts."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

import ikd_fast.mmdet  # noqa: F401  (before anything imports mmdet)
from ikd_fast.attack.memory.shards import DirectoryStore, directory, run_lock, shard
from ikd_fast.attack.memory.shards.directory import close_all
from ikd_fast.attack.memory.shards.layout import UNIT, slot_of
from tests.mmdet.conftest import IMAGES
from tests.mmdet.test_memory_files import config_for

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

ROOT = Path(__file__).parents[2]
VISITS = 2 * IMAGES


@pytest.fixture(autouse=True)
def _no_formatting(monkeypatch):
    """mmengine lays every config out with yapf, half a second each."""
    monkeypatch.setattr("mmengine.config.config.FormatCode", lambda text, **_: (text, True))
    yield
    close_all()


SHARED = "shared"
KINDS = pytest.mark.parametrize("kind", ["directory", SHARED])


def train(root, folder: Path, memory, *hooks) -> tuple[list[str], str]:
    """Two epochs; what was warned of the memory, and its report, from the log's file. ``memory``: its directory, or ``SHARED``."""
    name = f"{folder.parent.name}-{folder.name}"
    config = config_for(root, memory) | dict(work_dir=str(folder), log_level="INFO", experiment_name=name)
    if memory == SHARED:
        config["model"]["adv"]["attack"]["memory"] = dict(shared=True)
    config["train_dataloader"] |= dict(batch_size=4)
    config["default_hooks"]["checkpoint"] = dict(type="CheckpointHook", by_epoch=True, interval=1)
    runner = Runner.from_cfg(Config(config))
    for hook in hooks:
        runner.register_hook(hook)
    runner.train()
    assert runner.iter == 6
    return said(folder)


def said(folder: Path) -> tuple[list[str], str]:
    (log,) = folder.glob("*/*.log")
    lines = log.read_text().splitlines()
    (report,) = [line for line in lines if "visits had a perturbation" in line] or [""]
    return [line for line in lines if "WARNING" in line and "perturbation memory" in line], report


class At(Hook):
    """``action()`` before an iteration."""

    def __init__(self, iteration: int, action) -> None:
        self.iteration, self.action = iteration, action

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter == self.iteration:
            self.action()


def failing(number: int):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def place_for(kind: str, tmp_path: Path) -> Path | str:
    return kind if kind == SHARED else tmp_path / "memory"


def is_left(kind: str, tmp_path: Path, report: str) -> bool:
    """Whether the files of a run that is over are there."""
    (where,) = re.findall(r"/dev/shm/ikd_fast-\w+", report) if kind == SHARED else [tmp_path / "memory"]
    return Path(where).exists()


@KINDS
def test_a_disk_that_is_full_from_the_second_epoch_on(coco_root, tmp_path, monkeypatch, kind: str) -> None:
    full = At(3, lambda: monkeypatch.setattr(shard, "_write", failing(errno.ENOSPC)))
    warnings, report = train(coco_root, tmp_path / "work", place_for(kind, tmp_path), full)
    assert is_left(kind, tmp_path, report) == (kind != SHARED)
    (warning,) = warnings
    assert "record not written" in warning
    assert os.strerror(errno.ENOSPC) in warning
    assert f"{IMAGES} images," in report
    # What was written before is read on.
    assert f"{IMAGES} of {VISITS} visits had a perturbation" in report
    assert report.endswith(f"; records {IMAGES} not written")


@KINDS
def test_a_disk_that_is_full_from_the_first_record_on(coco_root, tmp_path, monkeypatch, kind: str) -> None:
    fallocate = os.posix_fallocate
    start = At(0, lambda: monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC)))
    warnings, report = train(coco_root, tmp_path / "work", place_for(kind, tmp_path), start)
    assert os.posix_fallocate is not fallocate
    (warning,) = warnings
    assert "record not written" in warning
    assert "0 images, 0 B" in report
    assert f"0 of {VISITS} visits had a perturbation, {VISITS} cold starts of unknown images" in report
    assert report.endswith(f"; records {VISITS} not written")


def refused_mkdir(monkeypatch, where: Path) -> None:
    mkdir = Path.mkdir

    def made(self, *args, **kwargs):
        return failing(errno.EROFS)() if self == where else mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", made)


def refused_open(monkeypatch, name: str, number: int) -> None:
    opened = os.open

    def open_(path, *args, **kwargs):
        refused = str(path).endswith(name)
        return failing(number)() if refused else opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_)


@pytest.mark.parametrize(
    ("fault", "number"),
    [
        (lambda patch, where: refused_mkdir(patch, where), errno.EROFS),
        (lambda patch, where: refused_open(patch, "memory/lock", errno.EACCES), errno.EACCES),
        (lambda patch, where: refused_open(patch, "0007.ikdmem", errno.EROFS), errno.EROFS),
        (lambda patch, where: patch.setattr(directory.Manifest, "write", failing(errno.ENOSPC)), errno.ENOSPC),
        (lambda patch, where: patch.setattr(os, "posix_fallocate", failing(errno.ENOSPC)), errno.ENOSPC),
        (lambda patch, where: patch.setattr(run_lock.fcntl, "flock", failing(errno.ENOLCK)), errno.ENOLCK),
        (lambda patch, where: patch.setattr(shard.Shard, "_prepare", failing(errno.EIO)), errno.EIO),
    ],
    ids=["mkdir", "lock", "shard", "manifest", "no room for the index", "no locks", "input/output"],
)  # fmt: skip
def test_a_directory_that_the_system_refuses(coco_root, tmp_path, monkeypatch, fault, number: int) -> None:
    where = tmp_path / "memory"
    with monkeypatch.context() as patch:
        fault(patch, where)
        warnings, report = train(coco_root, tmp_path / "work", where)
    (warning,) = warnings
    assert f"{where} cannot be used ({os.strerror(number)}). Training goes on without it" in warning
    assert f"0 of {VISITS} visits had a perturbation, {VISITS} cold starts of unknown images" in report
    assert report.endswith(f"; records {VISITS} not written")
    # Nothing is left that would trouble the next run.
    warnings, report = train(coco_root, tmp_path / "again", where)
    assert not warnings
    assert f"{IMAGES} of {VISITS} visits had a perturbation" in report


def test_no_room_in_shared_memory(coco_root, tmp_path, monkeypatch) -> None:
    """A container gives /dev/shm 64 MB, and its index may be too much."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
        warnings, report = train(coco_root, tmp_path / "work", SHARED)
    (warning,) = warnings
    assert re.search(r"/dev/shm/ikd_fast-\w+ cannot be used \(No space left on device\)", warning)
    assert report.endswith(f"; records {VISITS} not written")
    assert not is_left(SHARED, tmp_path, report)
    warnings, report = train(coco_root, tmp_path / "again", SHARED)
    assert not warnings
    assert f"{IMAGES} of {VISITS} visits had a perturbation" in report


def test_a_directory_that_is_removed_in_use(coco_root, tmp_path) -> None:
    where = tmp_path / "memory"
    warnings, report = train(coco_root, tmp_path / "work", where, At(4, lambda: shutil.rmtree(where)))
    (warning,) = warnings
    assert f"{where} was removed or replaced while it was in use" in warning
    # This run still has its open files.
    assert f"{IMAGES} of {VISITS} visits had a perturbation" in report
    assert report.endswith(f"; records {IMAGES} gone")
    assert not where.exists()


def test_a_file_in_the_way_is_a_mistake(coco_root, tmp_path) -> None:
    (tmp_path / "memory").write_text("mine")
    with pytest.raises(ValueError, match=r"memory: expected a directory .*; a file is in the way"):
        train(coco_root, tmp_path / "work", tmp_path / "memory")


def test_a_manifest_of_another_kind_is_refused(coco_root, tmp_path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.json").write_text("[]")
    with pytest.raises(ValueError, match=r"memory\.json: expected a perturbation memory's manifest"):
        train(coco_root, tmp_path / "work", tmp_path / "memory")


def test_a_second_run_is_refused(coco_root, tmp_path) -> None:
    other = DirectoryStore(tmp_path / "memory")
    other.open()
    with pytest.raises(RuntimeError, match=rf"another run is using .*process {os.getpid()} on .*of its own"):
        train(coco_root, tmp_path / "work", tmp_path / "memory")
    other.leave()
    assert not train(coco_root, tmp_path / "again", tmp_path / "memory")[0]


def flipped(path: Path) -> None:
    (place,) = places(path)
    with path.open("r+b") as file:
        file.seek(slot_of(place)[0] * UNIT + 1000)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))


def places(path: Path) -> list[int]:
    store = DirectoryStore(path.parent)
    store.open()
    (found,) = [[place for _, place in s._index.items()] for s in store.shards_open if s.path == path]
    store.close()
    return found


@pytest.mark.parametrize(
    ("damage", "kind", "reason"),
    [
        (flipped, "damaged", "its checksum differs"),
        (lambda path: os.truncate(path, path.stat().st_size // 2), "damaged", "cut short|no record of this"),
        (lambda path: path.write_bytes(b"GIF89a" * 9000), "foreign", "no shard of a perturbation memory"),
        (lambda path: path.write_bytes(path.read_bytes()[:8] + bytes(4) + path.read_bytes()[12:]), "foreign",
         "format version 0, expected 1"),
    ],
    ids=["bit", "cut", "foreign", "older"],
)  # fmt: skip
def test_a_damaged_shard_is_a_cold_start_and_counted(
    coco_root, tmp_path, damage, kind: str, reason: str
) -> None:
    where = tmp_path / "memory"
    train(coco_root, tmp_path / "first", where)
    # The smallest of the shards with one record.
    path = min((p for p in where.glob("*.ikdmem") if len(places(p)) == 1), key=lambda p: p.name)
    damage(path)
    warnings, report = train(coco_root, tmp_path / "second", where)
    (warning,) = warnings
    assert path.name in warning
    assert any(words in warning for words in reason.split("|"))
    # Of its two visits in this run, the first alone; every other image goes on from the first run.
    assert f"{VISITS - 1} of {VISITS} visits had a perturbation, 1 cold starts of unknown images" in report
    assert report.endswith(f"; records 1 {kind}")
    assert f"{IMAGES} images," in report


def test_files_that_may_not_grow(tmp_path) -> None:
    """A real limit: the system's signal for it (SIGXFSZ) ends no training."""
    command = [sys.executable, "-m", "tests.mmdet.limited_training", str(tmp_path), "100000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    warnings, report = said(tmp_path / "work")
    (warning,) = warnings
    assert "record not written" in warning
    assert os.strerror(errno.EFBIG) in warning
    assert f"0 of {IMAGES} visits had a perturbation" in report
    assert report.endswith(f"; records {IMAGES} not written")
