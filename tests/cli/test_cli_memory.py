"""``ikd-fast memory`` on directories made by hand: what it says of them, what it leaves, when it refuses."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from ikd_fast.attack.memory import MemorySettings, PerturbationMemory, Record
from ikd_fast.attack.memory.shards import DirectoryStore
from ikd_fast.attack.memory.shards.layout import HEAD_BYTES, RECORD_HEAD, UNIT, place_of, slot_of

SHARDS, CAPACITY = 2, 256
SIDE = 40
DELTA = 3 * SIDE * SIDE // 2
SLOT = -(-(RECORD_HEAD + DELTA) // UNIT) * UNIT
INDEX = HEAD_BYTES + CAPACITY * 16
VISITS = {3: (1, 10), 4: (5, 30), 8: (3, 20)}
"""Of images 3, 4 and 8: visits, and the step of the last."""


@pytest.fixture
def directory(tmp_path) -> Path:
    """Three images of 40 x 40, 4 bits: one in the odd shard, two in the even one."""
    where = tmp_path / "memory"
    memory = PerturbationMemory(store=DirectoryStore(where, shards=SHARDS, capacity=CAPACITY))
    memory.bind(MemorySettings(eps=8, step=2, data="3 images"))
    for id, (visits, step) in VISITS.items():
        delta = torch.full((DELTA,), id, dtype=torch.uint8)
        memory.put(id, Record((SIDE, SIDE), visits, step, delta))
    memory.close()
    return where


def reopened(where: Path) -> DirectoryStore:
    store = DirectoryStore(where)
    store.open()
    return store


def place(where: Path, id: int) -> tuple[Path, int]:
    """Where an image's contents begin."""
    store = reopened(where)
    shard = store.shards_open[id % SHARDS]
    unit, _ = slot_of(shard._index.place(id))
    store.close()
    return shard.path, unit * UNIT + RECORD_HEAD


def flip(where: Path, id: int) -> None:
    path, at = place(where, id)
    with path.open("r+b") as file:
        file.seek(at + 700)
        file.write(bytes([id ^ 1]))


def files(where: Path) -> int:
    return sum(path.stat().st_size for path in where.glob("*.ikdmem"))


def test_what_it_holds(ikd, directory) -> None:
    result = ikd("memory", directory, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    settings = found.pop("settings")
    assert found == {
        "directory": str(directory),
        "images": 3,
        "bytes": 3 * SLOT,
        "file_bytes": files(directory),
        "shards": SHARDS,
        "foreign": [],
        "set_aside": [],
        "visits": {"mean": 3.0, "most": 5},
        "steps": {"first": 10, "last": 30},
    }
    assert found["file_bytes"] >= SHARDS * INDEX + 3 * SLOT
    assert {name: settings[name] for name in ("eps", "step", "bits", "stride", "data")} == dict(
        eps=8, step=2, bits=4, stride=1, data="3 images"
    )
    lines = ikd("memory", directory).stdout.splitlines()
    assert lines[0] == f"directory: {directory}"
    assert "images: 3" in lines
    assert "bytes: 7.68 kB" in lines
    assert "visits: mean 3, most 5" in lines
    assert "steps: first 10, last 30" in lines


def test_an_empty_one(ikd, tmp_path) -> None:
    reopened(tmp_path / "memory").close()
    found = json.loads(ikd("memory", tmp_path / "memory", "--json").stdout)
    assert (found["images"], found["bytes"], found["visits"], found["steps"]) == (0, 0, None, None)
    assert ikd("memory", tmp_path / "memory").exit_code == 0


def test_verify(ikd, directory) -> None:
    good = ikd("memory", directory, "--verify", "--json")
    assert good.exit_code == 0
    assert json.loads(good.stdout) == dict(directory=str(directory), whole=3, damaged=[], count=0)
    flip(directory, 4)
    bad = ikd("memory", directory, "--verify", "--json")
    assert bad.exit_code == 1
    line = "0000.ikdmem: record of image 4: its checksum differs"
    assert json.loads(bad.stdout) == dict(directory=str(directory), whole=2, damaged=[line], count=1)
    text = ikd("memory", directory, "--verify")
    assert text.exit_code == 1
    assert f"    {line}" in text.stdout.splitlines()


def contents(where: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in where.iterdir() if path.name != "lock"}


def forget(where: Path, id: int) -> None:
    """Let an image's entry refer to a slot outside the file."""
    store = reopened(where)
    store.shards_open[id % SHARDS]._index.replace(id, place_of(1 << 20, 1))
    store.close()


@pytest.mark.parametrize("damage", ["foreign", "empty", "missing", "flipped", "elsewhere"])
def test_looking_changes_nothing(ikd, directory, damage: str) -> None:
    odd = directory / "0001.ikdmem"
    line = {
        "foreign": f"{odd}: no shard of a perturbation memory",
        "empty": f"{odd}: no shard of a perturbation memory",
        "flipped": "0001.ikdmem: record of image 3: its checksum differs",
        "elsewhere": "0001.ikdmem: record of image 3: ",
    }.get(damage)
    if damage == "foreign":
        odd.write_bytes(b"GIF89a" * 3000)
    elif damage == "empty":
        odd.write_bytes(b"")
    elif damage == "missing":
        odd.unlink()
    elif damage == "flipped":
        flip(directory, 3)
    else:
        forget(directory, 3)
    before = contents(directory)

    told = json.loads(ikd("memory", directory, "--json").stdout)
    of_file = damage in ("foreign", "empty")
    assert len(told["foreign"]) == of_file
    assert told["images"] == (3 if damage == "flipped" else 2)
    assert told["set_aside"] == []
    found = ikd("memory", directory, "--verify", "--json")
    told = json.loads(found.stdout)
    assert (told["whole"], told["count"], len(told["damaged"])) == (2, line is not None, line is not None)
    assert found.exit_code == (line is not None)
    if line is not None:
        assert told["damaged"][0].startswith(line)
    assert contents(directory) == before


def test_compact_gives_room_back_and_drops_what_is_damaged(ikd, directory) -> None:
    store = reopened(directory)
    for visits in range(6, 9):  # three lengths, so that slots are left over
        delta = torch.full((3 * (SIDE + 8 * visits) * SIDE // 2,), 9, dtype=torch.uint8)
        store.put(8, Record((SIDE, SIDE + 8 * visits), visits, 40 + visits, delta))
        store.flush()
    store.close()
    flip(directory, 4)
    before = files(directory)
    result = ikd("memory", directory, "--compact", "--json")
    assert result.exit_code == 0, result.output
    last = -(-(RECORD_HEAD + 3 * (SIDE + 64) * SIDE // 2) // UNIT) * UNIT
    assert json.loads(result.stdout) == dict(before=before, after=SHARDS * INDEX + SLOT + last, dropped=1)
    assert files(directory) == SHARDS * INDEX + SLOT + last
    store = reopened(directory)
    assert {id: store.get(id, torch.device("cpu")).visits for id in store.ids()} == {3: 1, 8: 8}
    assert bool((store.get(8, torch.device("cpu")).delta == 9).all())
    store.close()
    assert ikd("memory", directory, "--verify").exit_code == 0
    text = ikd("memory", directory, "--compact").stdout.splitlines()
    assert text == ["before: 25.6 kB", "after: 25.6 kB", "dropped: 0"]


def test_delete_removes_its_files_and_no_other(ikd, directory) -> None:
    (directory / "notes.txt").write_text("mine")
    (directory.parent / "beside.ikdmem").write_text("mine too")
    (directory / "0001.ikdmem.0a1b2c3d.aside").write_bytes(bytes(100))
    total = sum(path.stat().st_size for path in directory.iterdir()) - 4
    result = ikd("memory", directory, "--delete", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["directory"] == str(directory)
    assert abs(told["freed"] - total) < 100  # the lock names the process that has it
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]
    assert (directory.parent / "beside.ikdmem").exists()


def test_delete_removes_the_directory_that_is_empty_then(ikd, directory) -> None:
    assert ikd("memory", directory, "--delete").exit_code == 0
    assert not directory.exists()


@pytest.mark.parametrize("option", [(), ("--verify",), ("--compact",), ("--delete",)])
def test_refused_while_a_run_uses_it(ikd, directory, option) -> None:
    store = reopened(directory)
    before = sorted(path.name for path in directory.iterdir())
    result = ikd("memory", directory, *option)
    assert result.exit_code == 1
    assert result.stdout == ""
    text = " ".join(result.stderr.split())
    assert text.startswith(f"error: {directory}: another run is using this perturbation memory")
    assert re.search(rf"process {os.getpid()} on .*\. One run at a time", text)
    assert sorted(path.name for path in directory.iterdir()) == before
    store.close()


@pytest.mark.parametrize(
    ("make", "arguments", "code", "message"),
    [
        (lambda path: None, (), 1, "memory: no such directory"),
        (lambda path: path.mkdir(), (), 1, "memory: expected a perturbation memory, a directory with memory.json"),
        (lambda path: path.write_text("x"), (), 1, "memory: expected a directory of kept perturbations, got a file"),
        (lambda path: path.mkdir() or (path / "memory.json").write_text('{"format": 7}'), ("--delete",), 1,
         "memory.json: format 7, expected 1; made by another version of ikd_fast"),
        (lambda path: path.mkdir(), ("--verify", "--delete"), 2, "give one of --verify, --compact and --delete"),
        (lambda path: path.mkdir(), ("--sort",), 2, "No such option"),
    ],
    ids=["missing", "empty", "file", "version", "two options", "unknown option"],
)  # fmt: skip
def test_wrong_usage(ikd, tmp_path, make, arguments, code: int, message: str) -> None:
    make(tmp_path / "memory")
    result = ikd("memory", tmp_path / "memory", *arguments)
    text = " ".join((result.output + result.stderr).replace("│", " ").split())
    assert message in text
    assert result.exit_code == code
    assert "Traceback" not in text


def test_the_directory_is_asked_for(ikd) -> None:
    result = ikd("memory")
    assert result.exit_code == 2
    assert "Missing argument" in result.output + result.stderr
