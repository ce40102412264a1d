"""``ikd-fast attack`` by several processes, and killed: the same files, each made once."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

from tests.cli.conftest import written
from tests.distributed.pair import free_port
from tests.mmdet.conftest import IMAGES, retinanet, stock_config, write_coco

pytestmark = pytest.mark.distributed

LIMIT = 300


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Config, weights, and the set of one process that nobody disturbed."""
    from ikd_fast.mmdet.build import build_detector

    folder = tmp_path_factory.mktemp("offline")
    root = write_coco(folder / "coco")
    written(folder / "teacher.py", stock_config(root))
    torch.save(dict(state_dict=build_detector(retinanet()).state_dict()), folder / "teacher.pth")
    (_, said, code) = finished(started(folder, folder / "whole"))[0]
    assert code == 0, said
    return folder


def finished(processes: list[subprocess.Popen]) -> list[tuple[str, str, int]]:
    """What each wrote, and its exit code; none is left running."""
    try:
        return [(*process.communicate(timeout=LIMIT), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


def started(home: Path, out: Path, processes: int = 1, *more: str) -> list[subprocess.Popen]:
    """The command in so many processes, with the environment that torchrun gives them."""
    command = [
        sys.executable, "-m", "ikd_fast", "attack", "teacher.py", "teacher.pth", "--out", str(out), "--workers", "0", "--batch", "2",
        "--device", "cpu", "--json", *more,
    ]  # fmt: skip
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), TORCHELASTIC_RUN_ID="test")
    ranks = [
        {} if processes == 1 else dict(shared, RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE=str(processes))
        for i in range(processes)
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [
        subprocess.Popen(command, cwd=home, env={**os.environ, "OMP_NUM_THREADS": "1", **rank}, **pipes)
        for rank in ranks
    ]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "images").iterdir()}


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_make_the_set_once(home, tmp_path, processes: int) -> None:
    out = tmp_path / "set"
    done = finished(started(home, out, processes))
    assert [code for _, _, code in done] == [0] * processes, [err for _, err, _ in done]
    # One of them comes last, and tells of the whole set.
    reports = [json.loads(stdout) for stdout, _, _ in done if stdout.strip()]
    assert len(reports) == 1
    assert reports[0]["images"] == IMAGES
    assert contents(out) == contents(home / "whole")
    assert (out / "strength.jsonl").read_bytes() == (home / "whole/strength.jsonl").read_bytes()
    assert (out / "adversarial.json").read_bytes() == (home / "whole/adversarial.json").read_bytes()
    assert sorted(p.name for p in out.iterdir()) == [".lock", "adversarial.json", "images", "strength.jsonl"]


def test_each_process_has_its_own_share(home) -> None:
    """What no two may both do is decided by their ranks alone."""
    from ikd_fast.mmdet.offline.generate import Generator, Processes

    def groups(rank: int, count: int) -> list[list[int]]:
        generator = Generator.__new__(Generator)
        generator.images, generator.batch, generator.processes = range(23), 4, Processes(rank, count)  # type: ignore[assignment]
        generator.limit = 23
        return generator.groups()

    for count in (1, 2, 3, 7):
        shares = [groups(rank, count) for rank in range(count)]
        assert sorted(p for share in shares for group in share for p in group) == list(range(23))
        assert sorted(map(tuple, (g for share in shares for g in share))) == sorted(map(tuple, groups(0, 1)))


def killed(home: Path, out: Path, moment: float) -> bool:
    """Start it, and kill it so long after it has made something; whether it had not come to its end by itself."""
    before = len(made(out))
    (process,) = started(home, out)
    try:
        deadline = time.monotonic() + LIMIT
        while process.poll() is None and len(made(out)) == before:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(moment)
    finally:
        process.kill()
        _, stderr = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), stderr
    return process.returncode != 0


def made(out: Path) -> dict[str, int]:
    """Times of the files that are there."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "images").glob("[!.]*")}


def test_killed_at_any_moment_and_started_again(home, tmp_path) -> None:
    """Files that were there stay as they are, those that were not are made, all of them those of a run that nobody disturbed."""
    draws = random.Random(5)
    # On a busy machine it may be over before it is killed: then once more, from nothing.
    out = next(
        out
        for out in (tmp_path / f"set{k}" for k in range(10))
        if killed(home, out, 0 if out.name > "set0" else draws.uniform(0, 0.08))
    )
    for _ in range(2):
        before = made(out)
        killed(home, out, draws.uniform(0, 0.08))
        assert before.items() <= made(out).items()
    before = made(out)
    ((stdout, stderr, code),) = finished(started(home, out))
    assert code == 0, stderr
    report = json.loads(stdout)
    assert (report["there"], report["made"]) == (len(before), IMAGES - len(before))
    assert before.items() <= made(out).items()
    assert contents(out) == contents(home / "whole")
    assert (out / "strength.jsonl").read_bytes() == (home / "whole/strength.jsonl").read_bytes()


def test_one_torchrun_is_not_anothers_on_another_machine(monkeypatch) -> None:
    from ikd_fast.mmdet.offline.generate import Processes

    def run(machine: str, address: str) -> str:
        monkeypatch.setattr(socket, "gethostname", lambda: machine)
        for name, value in dict(
            RANK="1", WORLD_SIZE="2", MASTER_ADDR=address, MASTER_PORT="29500", TORCHELASTIC_RUN_ID="none"
        ).items():
            monkeypatch.setenv(name, value)
        return Processes.of_environment().run

    assert run("a", "127.0.0.1") != run("b", "127.0.0.1")
    assert run("a", "localhost") == run("a", "localhost")
    assert run("a", "10.0.0.1") == run("b", "10.0.0.1")


def test_a_second_run_in_the_folder_is_refused(home, tmp_path) -> None:
    from ikd_fast.attack.memory.shards.run_lock import RunLock
    from ikd_fast.mmdet.offline.generate import LOCK

    out = tmp_path / "set"
    out.mkdir()
    lock = RunLock(out / LOCK, "somebody else's", "set of adversarial images")
    lock.opened()
    ((_, stderr, code),) = finished(started(home, out))
    lock.release()
    assert code == 1
    said = " ".join(stderr.split())
    assert f"another run is using this set of adversarial images (process {os.getpid()}" in said
    assert not (out / "adversarial.json").exists()
