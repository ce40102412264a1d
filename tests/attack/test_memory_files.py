"""Records in files: whole or not at all, whoever writes, whenever a process is killed, whatever the file has become."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ikd_fast.attack.memory import MemorySettings, PerturbationMemory, Record, Store, View
from ikd_fast.attack.memory.shards import DirectoryStore, SharedStore, run_lock, upkeep
from ikd_fast.attack.memory.shards.layout import HEAD_BYTES, UNIT, slot_of
from ikd_fast.attack.memory.shards.run_lock import RunLock
from ikd_fast.attack.memory.shards.slots import Spares, gaps
from tests.attack.shard_writer import CPU, IMAGES, record, whole

ROOT = Path(__file__).parents[2]


def store(directory: Path, **changes) -> DirectoryStore:
    made = DirectoryStore(directory, **dict(shards=2, capacity=256, run="a run") | changes)
    made.open()
    return made


def filled(directory: Path, visits: int = 1) -> None:
    with_all = store(directory)
    for id in range(IMAGES):
        with_all.put(id, record(id, visits))
    with_all.close()


def writer(directory: Path, seed: int, seconds: float, at_least: int = 0) -> subprocess.Popen:
    numbers = map(str, (seed, seconds, at_least))
    command = [sys.executable, "-m", "tests.attack.shard_writer", str(directory), *numbers]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_it_is_a_store(tmp_path) -> None:
    for made in (store(tmp_path / "a"), SharedStore(f"test-{os.getpid()}", folder=tmp_path)):
        assert isinstance(made, Store)
        made.close()


@pytest.mark.parametrize("id", [0, 1, 2**63, 2**64 - 1, -1])
def test_what_is_put_is_there_now_and_later(tmp_path, id: int) -> None:
    velocity = torch.randn(3, 4, 5).half()
    given = Record((4, 5), 7, -3, torch.arange(200, dtype=torch.uint8), velocity)
    first = store(tmp_path)
    first.put(id, given)
    given.delta[:] = 0  # a copy was taken
    for made in (first, None):
        if made is None:
            first.close()
            made = store(tmp_path)
        found = made.get(id, CPU)
        assert (found.size, found.visits, found.step) == ((4, 5), 7, -3)
        assert torch.equal(found.delta, torch.arange(200, dtype=torch.uint8))
        assert torch.equal(found.velocity, velocity)
        found.delta[:] = 0  # as is what comes back
        assert made.get(id, CPU).delta[5] == 5
        made.flush()
        assert len(made) == 1
        assert made.get(3, CPU) is None
    made.close()


def test_a_memory_of_files_goes_on_in_the_next_run(tmp_path) -> None:
    view, kept = View.identity((4, 5)), None
    for run in range(2):
        memory = PerturbationMemory(store=store(tmp_path))
        codes = memory.bind(MemorySettings(eps=8, step=2, data="a set"))
        (found,) = memory.fetch([7], [view], "cpu")
        if run == 0:
            assert found is None
            kept = codes.start((3, 4, 5), seed=0, id=7, epoch=0, device="cpu")
            memory.put(7, Record((4, 5), 1, 0, kept))
            memory.store.close()
        else:
            assert torch.equal(found.delta, kept)
    other = PerturbationMemory(store=memory.store)
    with pytest.raises(ValueError, match="eps: 8 there, 4 now; .*data: a set there, another now"):
        other.bind(MemorySettings(eps=4, step=2, data="another"))
    memory.store.close()


def test_slots_are_used_again(tmp_path) -> None:
    """Records of five lengths, replaced twenty times: no more than a spare of each length a shard."""
    made = store(tmp_path)
    sizes = []
    for visits in range(20):
        for id in range(IMAGES):
            made.put(id, record(id, visits))
        made.flush()
        sizes.append(sum(path.stat().st_size for path in tmp_path.glob("*.ikdmem")))
    assert all(whole(id, made.get(id, CPU)) for id in range(IMAGES))
    largest = max(record(id, 0).nbytes for id in range(IMAGES)) + UNIT + 64
    assert sizes[-1] - sizes[0] <= 2 * 5 * largest * 9 / 8
    assert made.nbytes == sum(-(-(64 + record(id, 0).nbytes) // UNIT) * UNIT for id in range(IMAGES))
    made.close()


def test_spares_by_hand() -> None:
    spares = Spares()
    for unit, units in ((100, 5), (10, 3), (50, 8)):
        spares.give(unit, units)
    assert spares.take(4) == 100  # the smallest that has four; one is left at 104
    assert spares.take(1) == 104
    assert spares.take(9) is None
    assert spares.take(8) == 50
    assert spares.take(3) == 10
    assert (len(spares), spares.units) == (0, 0)
    assert gaps([(4, 2), (5, 3), (9, 0), (30, 1)], 2, 12) == ([(2, 2), (6, 6)], [(5, 3), (9, 0), (30, 1)])


def test_three_processes_never_read_a_torn_record(tmp_path) -> None:
    processes = [writer(tmp_path, seed, 2, at_least=400) for seed in range(3)]
    told = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in processes]
    for one in told:
        assert one["read"] > 100
        assert one["torn"] == one.get("damaged", 0) == 0
    made = store(tmp_path)
    assert len(made) == IMAGES
    assert all(whole(id, made.get(id, CPU)) for id in range(IMAGES))
    # Of no two images is a slot the same, and none of them is free.
    for shard in made._shards:
        used = [slot_of(place) for _, place in shard._index.items()]
        end = (tmp_path / shard.path.name).stat().st_size // UNIT
        free, wrong = gaps(used, HEAD_BYTES // UNIT, end)
        assert not wrong
    made.close()


@pytest.mark.slow
def test_killed_at_any_moment_the_old_record_or_the_new_one_is_there(tmp_path) -> None:
    filled(tmp_path)
    newest = dict.fromkeys(range(IMAGES), 1)
    for round in range(5):
        processes = [writer(tmp_path, 2 * round + k + 1, 60) for k in range(2)]
        for process in processes:
            assert process.stdout.readline() == "begun\n"
            assert process.stdout.readline() == "each was met\n"
        time.sleep(0.3 + 0.13 * round)
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        made = store(tmp_path)
        assert not made.counts["damaged"]
        for id in range(IMAGES):
            found = made.get(id, CPU)
            assert whole(id, found)
            assert found.visits >= newest[id] or found.visits >> 20 == 2 * round + 1
            newest[id] = found.visits
        made.close()
    assert min(newest.values()) > 1


def test_a_flipped_bit_is_no_record(tmp_path, caplog) -> None:
    filled(tmp_path)
    made = store(tmp_path)
    unit, _ = slot_of(made._shards[1]._index.place(5))
    with (tmp_path / "0001.ikdmem").open("r+b") as file:
        file.seek(unit * UNIT + 4000)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    with caplog.at_level(logging.WARNING, "ikd_fast"):
        assert made.get(5, CPU) is None
        assert made.get(5, CPU) is None
    assert made.counts["damaged"] == 2
    assert len(caplog.messages) == 1
    assert "0001.ikdmem: record of image 5: its checksum differs" in caplog.text
    assert all(made.get(id, CPU) is not None for id in range(IMAGES) if id != 5)
    made.put(5, record(5, 9))
    made.flush()
    assert made.get(5, CPU).visits == 9
    made.close()


def test_a_file_cut_short_loses_what_was_cut(tmp_path) -> None:
    filled(tmp_path)
    path = tmp_path / "0000.ikdmem"
    os.truncate(path, path.stat().st_size * 2 // 3)
    made = store(tmp_path)
    there = [id for id in range(IMAGES) if made.get(id, CPU) is not None]
    assert 20 < len(there) < IMAGES
    for id in range(IMAGES):
        made.put(id, record(id, 2))
    made.flush()
    assert all(made.get(id, CPU).visits == 2 for id in range(IMAGES))
    assert all(whole(id, made.get(id, CPU)) for id in range(IMAGES))
    made.close()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"GIF89a" + bytes(9000), "no shard of a perturbation memory"),
        (lambda data: data[:8] + b"\x09" + data[9:], "format version 9, expected 1"),
        (lambda data: data[:12] + b"\x07" + data[13:], "its head is damaged"),
        (lambda data: data[:HEAD_BYTES], "shorter than its own index"),
        (lambda data: b"x", "no shard of a perturbation memory"),
    ],
)
def test_a_file_that_is_no_shard_is_set_aside(tmp_path, damage, reason: str, caplog) -> None:
    filled(tmp_path)
    path = tmp_path / "0000.ikdmem"
    path.write_bytes(damage(path.read_bytes()))
    bad = path.read_bytes()
    with caplog.at_level(logging.WARNING, "ikd_fast"):
        made = store(tmp_path)
    assert reason in caplog.text
    (aside,) = tmp_path.glob("*.aside")
    assert aside.read_bytes() == bad
    assert made.counts["foreign"] == 1
    assert [id for id in range(IMAGES) if made.get(id, CPU) is None] == list(range(0, IMAGES, 2))
    made.close()


def test_another_runs_directory_is_refused(tmp_path) -> None:
    made = store(tmp_path)
    again = store(tmp_path)  # of the same run
    with pytest.raises(RuntimeError, match=rf"another run is using.*process {os.getpid()} on "):
        store(tmp_path, run="another")
    made.put(2, record(2, 1))
    made.flush()
    assert whole(2, again.get(2, CPU))
    made.close()
    with pytest.raises(RuntimeError, match="another run"):
        store(tmp_path, run="another")
    again.close()
    store(tmp_path, run="another").close()


FORKS = """
import os, signal, sys, time
from tests.attack.test_memory_files import record, store
made = store(sys.argv[1])
made.put(2, record(2, 1))
made.flush()
worker = os.fork()
if worker == 0:
    time.sleep(60)
    os._exit(0)
print(worker, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_runs_loader_workers_do_not_keep_its_lock(tmp_path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    worker = int(process.stdout.readline())
    try:
        assert process.wait() == -signal.SIGKILL
        os.kill(worker, 0)  # it is there
        made = store(tmp_path, run="another")
        assert whole(2, made.get(2, CPU))
        made.close()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_forked_process_is_one_of_the_run(tmp_path) -> None:
    made = store(tmp_path)
    made.put(2, record(2, 1))
    made.flush()
    worker = os.fork()
    if worker == 0:
        good = False
        try:
            good = not made.is_open and whole(2, made.get(2, CPU))
            made.put(3, record(3, 1))
            made.leave()
        finally:
            os._exit(0 if good else 1)  # and not on as a second pytest
    assert os.waitpid(worker, 0)[1] == 0
    assert whole(3, made.get(3, CPU))
    with pytest.raises(RuntimeError, match="another run"):
        store(tmp_path, run="another")
    made.close()


def test_one_run_starts_again_where_another_was(tmp_path, monkeypatch) -> None:
    """Whoever is first holds the lock before it has written its name; until then the last run's stands there."""
    path = tmp_path / "lock"
    path.write_text(json.dumps(dict(run="yesterday's", pid=1, host="here")))
    first = os.open(path, os.O_RDWR)
    fcntl.flock(first, fcntl.LOCK_EX)

    def be_first() -> None:
        time.sleep(0.3)
        name = json.dumps(dict(run="today's", pid=os.getpid(), host="here")).encode()
        os.pwrite(first, name, 0)
        os.ftruncate(first, len(name))
        fcntl.flock(first, fcntl.LOCK_SH)

    thread = threading.Thread(target=be_first)
    thread.start()
    monkeypatch.setattr(run_lock, "PATIENCE", 60)
    second = RunLock(path, "today's")
    thread.join()
    assert not second.first
    monkeypatch.setattr(run_lock, "PATIENCE", 0.1)
    with pytest.raises(RuntimeError, match=f"another run is using .*process {os.getpid()} on here"):
        RunLock(path, "tomorrow's")
    second.release()
    fcntl.flock(first, fcntl.LOCK_EX)  # at work on it alone
    with pytest.raises(RuntimeError, match="another run is using"):
        RunLock(path, "tomorrow's")
    os.close(first)
    assert RunLock(path, "tomorrow's").first


def test_a_run_that_kept_nothing_binds_no_other(tmp_path) -> None:
    small = MemorySettings(eps=8, step=2, data="12 images")
    large = MemorySettings(eps=4, step=4, data="90 images")

    def opened(stride: int, capacity: int) -> PerturbationMemory:
        return PerturbationMemory(stride=stride, store=store(tmp_path, shards=1, capacity=capacity))

    first = opened(1, 16)
    first.bind(small)
    with pytest.raises(ValueError, match="eps: 8 there, 4 now"):
        first.bind(large)  # whose perturbations are on their way
    first.close()

    second = opened(2, 128)
    second.bind(large)
    for id in range(90):  # more than the first one's index has room for
        second.put(id, Record((4, 4), 1, 1, torch.full((6,), id, dtype=torch.uint8)))
    second.store.flush()
    assert len(second.store) == 90
    assert not second.store.counts["not written"]
    second.close()

    third = opened(1, 1024)
    with pytest.raises(ValueError, match=r"stride: 2 there, 1 now"):
        third.bind(large)
    assert third.store.get(89, CPU).delta[0] == 89
    third.close()


def test_a_seed_for_something_else_leaves_the_directory_as_it_was(tmp_path) -> None:
    class Refusing:
        def check(self, settings: MemorySettings) -> None:
            raise ValueError(f"not for eps {settings.eps:g}")

    memory = PerturbationMemory(store=store(tmp_path))
    memory.seed = Refusing()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="not for eps 8"):
        memory.bind(MemorySettings(eps=8, step=2))
    assert memory.store.settings is None
    memory.close()
    assert json.loads((tmp_path / "memory.json").read_text())["settings"] is None


@pytest.mark.parametrize("lacks", ["posix_fallocate", "fdatasync"])
def test_a_system_without_what_files_need(tmp_path, monkeypatch, lacks: str) -> None:
    monkeypatch.delattr(os, lacks)
    with pytest.raises(ImportError, match=rf"files need POSIX's {lacks}, .* leave directory and shared out"):
        DirectoryStore(tmp_path)


@pytest.mark.parametrize("holder", [0, 1])
def test_two_images_of_one_slot(tmp_path, holder: int) -> None:
    """As an index may be that two machines wrote: the record is its own image's, and stays whole whatever the other does."""
    made = store(tmp_path, shards=1)
    for id in (0, 1, 2):
        made.put(id, record(id, 1))
    made.flush()
    (shard,) = made.shards_open
    other = 1 - holder
    shard._index.replace(other, shard._index.place(holder))
    made.close()
    made = store(tmp_path)
    assert made.counts["damaged"] == 1
    assert made.get(other, CPU) is None
    for visits in range(2, 6):
        made.put(other, record(other, visits))
        made.flush()
    assert made.get(other, CPU).visits == 5
    assert all(whole(id, made.get(id, CPU)) for id in (holder, 2))
    made.close()


def test_room_is_asked_for_in_the_files_own_words(tmp_path) -> None:
    memory = PerturbationMemory(store=store(tmp_path))
    memory.bind(MemorySettings(eps=8, step=2))
    with pytest.raises(MemoryError) as raised:
        memory.require_room(memory.forecast([(480, 640)] * 100, resolution="original"), available=1000)
    memory.close()
    assert "host memory" not in str(raised.value)
    assert "give the files more room" in str(raised.value)


def test_shards_whose_manifest_is_gone_are_set_aside(tmp_path) -> None:
    """Nobody knows which settings they were made with."""
    filled(tmp_path)
    (tmp_path / "memory.json").unlink()
    made = store(tmp_path)
    assert made.counts["foreign"] == 2
    assert made.settings is None
    assert not len(made)
    made.close()


@pytest.fixture
def unprivileged():
    """Nobody's rights, where this process has root's."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


@pytest.mark.parametrize("there", [False, True], ids=["new", "used before"])
def test_a_directory_without_permission(tmp_path, caplog, request, there: bool) -> None:
    directory = tmp_path / "memory"
    directory.mkdir()
    if there:
        filled(directory)
    for path in (*directory.iterdir(), directory):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    request.getfixturevalue("unprivileged")
    made = DirectoryStore(directory, shards=2, capacity=256)
    with pytest.raises(PermissionError):
        made.open()
    with caplog.at_level(logging.WARNING, "ikd_fast"):
        for id in range(3):
            made.put(id, record(id, 1))
            assert made.get(id, CPU) is None
        made.settings = dict(eps=8.0)
    (message,) = caplog.messages
    assert f"{directory} cannot be used ({os.strerror(errno.EACCES)}). Training goes on without it" in message
    assert made.counts == {"not written": 3}
    assert made.settings == dict(eps=8.0)
    assert not made.is_open
    made.sync()
    made.close()


def test_shared_memory_goes_with_the_last_process(tmp_path) -> None:
    one, two = (SharedStore("some-run", run="a run", folder=tmp_path) for _ in range(2))
    two.open()
    one.put(1, record(1, 1))
    one.flush()
    assert whole(1, two.get(1, CPU))
    one.close()
    assert whole(1, two.get(1, CPU))
    assert [path.name for path in tmp_path.iterdir()] == ["ikd_fast-some-run"]
    two.leave()
    again = SharedStore("some-run", folder=tmp_path)
    assert whole(1, again.get(1, CPU))
    again.close()
    assert not list(tmp_path.iterdir())


def limited(size: int):
    """Of files that this process writes, as a full disk is to a growing one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    return before


def test_where_nothing_more_can_be_written_the_rest_goes_on(tmp_path, caplog) -> None:
    made = store(tmp_path, shards=1)
    for id in range(10):
        made.put(id, record(id, 1))
    made.flush()
    before = limited((tmp_path / "0000.ikdmem").stat().st_size)
    try:
        with caplog.at_level(logging.WARNING, "ikd_fast"):
            for id in range(IMAGES):
                made.put(id, record(id, 2))
            made.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert made.counts["not written"] > 20
    assert len(caplog.messages) == 1
    assert "record not written" in caplog.text
    assert os.strerror(errno.EFBIG) in caplog.text
    assert all(whole(id, made.get(id, CPU)) for id in range(10))
    for id in range(IMAGES):
        made.put(id, record(id, 3))
    made.flush()
    assert all(made.get(id, CPU).visits == 3 for id in range(IMAGES))
    made.close()


def test_a_full_disk(tmp_path, monkeypatch) -> None:
    made = store(tmp_path)

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    for id in range(IMAGES):
        made.put(id, record(id, 1))
    made.flush()
    assert made.counts["not written"] == IMAGES
    assert made.get(1, CPU) is None
    monkeypatch.undo()
    made.put(1, record(1, 1))
    made.flush()
    assert whole(1, made.get(1, CPU))
    made.close()


def test_a_directory_that_was_removed_is_said(tmp_path, caplog) -> None:
    made = store(tmp_path / "memory")
    made.put(1, record(1, 1))
    made.flush()
    for path in (tmp_path / "memory").iterdir():
        path.unlink()
    (tmp_path / "memory").rmdir()
    with caplog.at_level(logging.WARNING, "ikd_fast"):
        made.put(2, record(2, 1))
        made.flush()
    assert "was removed or replaced while it was in use" in caplog.text
    made.close()


def test_an_index_that_is_full(tmp_path) -> None:
    made = store(tmp_path, shards=1, capacity=8)
    for id in range(12):
        made.put(id, record(id, 1))
    made.flush()
    assert len(made) == 8
    assert made.counts["not written"] == 4
    assert sum(made.get(id, CPU) is not None for id in range(12)) == 8
    made.close()


@pytest.mark.parametrize(("changes", "message"), [(dict(shards=0), "shards must be a whole number in 1..4096, got 0"),
    (dict(capacity=1.5), "capacity must be a whole number in 1..1073741824, got 1.5")])  # fmt: skip
def test_numbers_that_cannot_be(tmp_path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        store(tmp_path, **changes)


def test_a_manifest_that_cannot_be_read_is_an_error_that_names_it(tmp_path) -> None:
    store(tmp_path).close()
    for text, message in (
        ("{", "expected a perturbation memory's manifest"),
        ('{"format": 99}', "format 99, expected 1"),
    ):
        (tmp_path / "memory.json").write_text(text)
        with pytest.raises(ValueError, match=rf"memory\.json: {message}"):
            store(tmp_path)


def test_summary_verify_compact_delete(tmp_path) -> None:
    directory = tmp_path / "memory"
    filled(directory, 3)
    filled(directory, 5)
    made = store(directory)
    made.settings = dict(eps=8.0)
    made.close()
    told = upkeep.summary(directory)
    assert (told["images"], told["shards"], told["settings"]) == (IMAGES, 2, {"eps": 8.0})
    assert told["visits"] == dict(mean=5.0, most=5)
    assert told["steps"] == dict(first=5, last=5)
    assert upkeep.verify(directory) == dict(directory=str(directory), whole=IMAGES, damaged=[], count=0)
    made = store(directory)
    unit, _ = slot_of(made._shards[0]._index.place(4))
    made.close()
    with (directory / "0000.ikdmem").open("r+b") as file:
        file.seek(unit * UNIT + 100)
        file.write(b"damage")
    (line,) = upkeep.verify(directory)["damaged"]
    assert line == "0000.ikdmem: record of image 4: its checksum differs"
    done = upkeep.compact(directory)
    assert done["dropped"] == 1
    assert done["after"] < done["before"]
    assert upkeep.verify(directory)["whole"] == IMAGES - 1
    made = store(directory)
    assert made.settings == dict(eps=8.0)
    assert all(whole(id, made.get(id, CPU)) for id in range(IMAGES) if id != 4)
    assert made.get(4, CPU) is None
    with pytest.raises(RuntimeError, match="another run is using"):
        upkeep.delete(directory)
    made.close()
    (directory / "notes.txt").write_text("mine")
    assert upkeep.delete(directory) > done["after"]
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]
    with pytest.raises(
        ValueError, match=r"memory: expected a perturbation memory, a directory with memory\.json"
    ):
        upkeep.summary(directory)
