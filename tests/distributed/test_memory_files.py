"""One memory of files for several processes: it holds what one process keeps in its own memory, and no rank waits for one that failed."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ikd_fast import OnlineDIFGSM
from ikd_fast.attack.memory import DirectoryStore, HostStore, PerturbationMemory, SharedStore
from ikd_fast.attack.memory.shards import shard
from ikd_fast.kernels.reference.philox import Stream, draw
from ikd_fast.mmdet import memory_files
from tests.distributed import work
from tests.distributed.pair import Pair
from tests.distributed.test_carry import visit, waves
from tests.mmdet.test_memory_files import config_for

from mmengine.dist import get_dist_info
from mmengine.hooks import Hook

pytestmark = pytest.mark.distributed

IDS = list(range(9))
EPOCHS = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    processes = Pair(tmp_path_factory.mktemp("three"), world=3)
    yield processes
    processes.close()


def mine(epoch: int) -> list[int]:
    """This rank's images: others in every epoch."""
    rank, world = get_dist_info()
    return sorted(IDS, key=lambda i: draw(1, i, epoch, Stream.ORDER)[0])[rank::world]


@contextmanager
def disk(before: Callable[[], None]) -> Iterator[None]:
    """Of which every write does ``before`` first."""
    keep = shard._write

    def write(*arguments) -> None:
        before()
        keep(*arguments)

    shard._write = write
    try:
        yield
    finally:
        shard._write = keep


def slow() -> None:
    time.sleep(0.02)  # longer than an epoch here: who does not wait for what is written finds old records


def slower() -> None:
    time.sleep(0.2)  # the same, of a detector's steps


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def store_in(kind: str, folder: str):
    if kind == "shared memory":
        return SharedStore("equality", run="a run", folder=folder, capacity=256)
    if kind == "directory":
        return DirectoryStore(folder, shards=3, capacity=64, run="a run")
    return HostStore()


def visited(kind: str, folder: str, memory: dict, **attack) -> dict:
    """All images' records after all epochs as this rank finds them, which it met in which epoch, and its counters."""
    store = store_in(kind, folder)
    attack = OnlineDIFGSM(
        "carry", value_range=(0, 1), objective=lambda images, b: waves(images[0], b.targets),
        memory=PerturbationMemory(store=store, **memory), **attack,
    )  # fmt: skip
    met = []
    for epoch in range(EPOCHS):
        met.append(mine(epoch))
        with disk(slow):
            for k in range(0, len(met[-1]), 2):
                visit(attack, met[-1][k : k + 2], epoch)
            if kind != "host memory":
                store.flush()
        if dist.is_initialized():
            dist.barrier()
    found = {i: store.get(i, CPU) for i in IDS}
    records = {
        i: (r.size, r.visits, r.step, r.delta.numpy().tobytes())
        + (() if r.velocity is None else (r.velocity.numpy().tobytes(),))
        for i, r in found.items()
    }
    counters = attack.memory.counters | dict(getattr(store, "counts", {}))
    if dist.is_initialized():
        dist.barrier()
    store.close()
    return dict(records=records, met=met, counters=counters)


@pytest.mark.parametrize(
    ("memory", "attack"),
    [({}, {}), (dict(stride=2), dict(momentum=0.9)), (dict(bits=2), dict(refresh=2))],
    ids=["plain", "stride 2, momentum", "2 bits, refresh"],
)
@pytest.mark.parametrize("kind", ["directory", "shared memory"])
def test_one_two_and_three_processes_keep_the_same_bits(pair, three, tmp_path, kind, memory, attack) -> None:
    """The image that rank 0 met is another rank's in the next epoch, and the truth knows no files."""
    truth = visited("host memory", "", memory, **attack)["records"]
    assert len({record[3] for record in truth.values()}) == len(IDS)
    told = {
        1: [visited(kind, str(tmp_path / "1"), memory, **attack)],
        2: pair.run(visited, kind, str(tmp_path / "2"), memory, **attack),
        3: three.run(visited, kind, str(tmp_path / "3"), memory, **attack),
    }
    for world, ranks in told.items():
        for rank in ranks:
            assert rank["records"] == truth, world
            assert not rank["counters"].get("damaged")
        # Cold at the first visit alone, whoever had met the image before.
        assert sum(rank["counters"]["unknown"] for rank in ranks) == len(IDS)
        assert sum(rank["counters"]["hits"] for rank in ranks) == len(IDS) * (EPOCHS - 1)
        met = [{i for epoch in rank["met"] for i in epoch} for rank in ranks]
        if world > 1:
            assert sum(len(one) for one in met) > 1.5 * len(IDS)


def joined(directory: str, rank: int | None = None, error: Exception | None = None) -> tuple:
    """What :func:`~ikd_fast.mmdet.memory_files.join` does where ``error`` meets one rank; (raised, is open, warnings)."""
    store, raised = DirectoryStore(directory), None
    if get_dist_info()[0] == rank:

        def refuse() -> None:
            raise error

        store.open = refuse
    try:
        memory_files.join(store, 9, directory)
    except Exception as problem:
        raised = f"{type(problem).__name__}: {problem}"
    found = (raised, store.is_open, sorted(store.told))
    dist.barrier()  # so that nobody is the first one twice
    store.leave()
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_refuses_ends_all(pair, tmp_path, rank: int) -> None:
    told = pair.run(joined, str(tmp_path), rank, RuntimeError("not here"), limit=30)
    assert told[rank][0] == "RuntimeError: not here"
    assert (
        told[1 - rank][0]
        == f"RuntimeError: rank {rank} cannot use the perturbation memory: RuntimeError: not here"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_where_the_system_refuses_one_rank_all_go_on(pair, tmp_path, rank: int) -> None:
    error = OSError(errno.EROFS, os.strerror(errno.EROFS))
    told = pair.run(joined, str(tmp_path), rank, error, limit=30)
    assert told[rank] == (None, False, ["not written"])
    assert told[1 - rank] == (None, True, [])


def test_another_runs_directory_is_refused_in_every_rank(pair, tmp_path) -> None:
    other = DirectoryStore(tmp_path)
    other.open()
    told = pair.run(joined, str(tmp_path), limit=30)
    other.close()
    assert [raised.count("another run is using this perturbation memory") for raised, _, _ in told] == [1, 1]
    assert told[0][0].startswith("RuntimeError: ")
    assert told[1][0].startswith("RuntimeError: rank 0 cannot use the perturbation memory: RuntimeError: ")
    assert [raised for raised, _, _ in pair.run(joined, str(tmp_path), limit=30)] == [None, None]


def trained(config: dict, folder: str, kind: Callable[[], None], ranks: list[int]) -> dict:
    """A training in which these ranks have such a disk; its rows, and the memory's counters."""
    counters = {}

    class Look(Hook):
        def after_train(self, runner) -> None:
            counters.update(work.plain(runner.model).ikd.attack.memory.counters)

    with disk(kind if get_dist_info()[0] in ranks else lambda: None):
        return work.train(config, folder, hooks=(Look(),)) | dict(counters=counters)


def refused_training(config: dict, folder: str, rank: int) -> tuple[int, bool, str]:
    """A training whose directory the system refuses to one rank: iterations, whether this rank used it, and its log."""
    error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    used = []

    class Look(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
            used.append(work.plain(runner.model).ikd.attack.memory.store.is_open)

    def refuse(self) -> None:
        raise error

    keep = DirectoryStore.open
    if get_dist_info()[0] == rank:
        DirectoryStore.open = refuse
    try:
        rows = work.train(config, folder, hooks=(Look(),))["rows"]
    finally:
        DirectoryStore.open = keep
    return len(rows), all(used), "".join(path.read_text() for path in Path(folder).glob("*/*.log"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_training_goes_on_where_the_system_refuses_one_rank(pair, coco_root, tmp_path, rank: int) -> None:
    config = config_for(coco_root, tmp_path / "memory") | dict(log_level="INFO")
    config["train_dataloader"] |= dict(batch_size=3)
    config["default_hooks"]["checkpoint"] = dict(type="CheckpointHook", by_epoch=False, interval=2)
    told = pair.run(refused_training, config, str(tmp_path / "work"), rank, limit=100)
    assert [rows for rows, _, _ in told] == [4, 4]
    assert [used for _, used, _ in told] == [rank == 1, rank == 0]
    log = told[0][2]
    assert f"cannot be used ({os.strerror(errno.EMFILE)}). Training goes on without it" in log or (
        "rank 1: " in log and "records not written. Training goes on" in log
    )
    assert "; records 12 not written" in log


def found_at_checkpoints(config: dict, folder: str) -> list[tuple[int, int]]:
    """Iterations at which a checkpoint was saved, and records in the files then: of both ranks, where each writes slowly."""
    found = []

    class Look(Hook):
        def before_save_checkpoint(self, runner, checkpoint) -> None:
            found.append((runner.iter + 1, len(work.plain(runner.model).ikd.attack.memory.store)))

    with disk(slower):
        work.train(config, folder, hooks=(Look(),))
    return found


@pytest.mark.parametrize("by_epoch", [False, True])
def test_a_checkpoint_waits_for_every_ranks_records(pair, coco_root, tmp_path, by_epoch: bool) -> None:
    config = config_for(coco_root, tmp_path / "memory")
    config["train_dataloader"] |= dict(batch_size=3)
    config["default_hooks"]["checkpoint"] = dict(type="CheckpointHook", by_epoch=by_epoch, interval=1)
    first, other = pair.run(found_at_checkpoints, config, str(tmp_path / "work"), limit=100)
    assert other == []
    images = [12] if by_epoch else [6, 12]
    assert [count for _, count in first][: len(images)] == images


def test_in_a_runner_an_epoch_begins_with_what_all_ranks_wrote(pair, coco_root, tmp_path) -> None:
    """Images change ranks between epochs, and none is met cold twice, however slow the disk is."""
    config = config_for(coco_root, tmp_path / "memory")
    config["train_dataloader"] |= dict(batch_size=3, sampler=dict(type="KeyedSampler", infinite=True))
    config["train_cfg"] = dict(type="IterBasedTrainLoop", max_iters=4, val_interval=1000)
    config["default_hooks"]["checkpoint"] = None
    told = pair.run(trained, config, str(tmp_path / "work"), slower, [0, 1], limit=100)
    first, second = (
        [{i for row in rank["rows"][k : k + 2] for i in row["ids"]} for rank in told] for k in (0, 2)
    )
    assert first[0] & second[1]
    assert sum(rank["counters"]["unknown"] for rank in told) == 12
    assert sum(rank["counters"]["hits"] for rank in told) == 12


def test_the_log_tells_of_another_ranks_trouble(pair, coco_root, tmp_path) -> None:
    """12 images, 2 epochs, a rank of two that cannot write: half of the visits, and the log is the other's."""
    config = config_for(coco_root, tmp_path / "memory") | dict(log_level="INFO")
    told = pair.run(trained, config, str(tmp_path / "work"), full, [1], limit=100)
    seen = [sum(len(row["ids"]) for row in rank["rows"]) for rank in told]
    assert seen == [12, 12]
    (log,) = Path(tmp_path / "work").glob("*/*.log")
    lines = log.read_text().splitlines()
    (warning,) = [line for line in lines if "WARNING" in line and "perturbation memory" in line]
    assert warning.endswith("rank 1: 6 records not written. Training goes on")
    (report,) = [line for line in lines if "visits had a perturbation" in line]
    assert report.endswith("; records 12 not written (visits: this rank's)")
