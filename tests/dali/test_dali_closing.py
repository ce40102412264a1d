"""What a loader leaves behind: no thread, no open file, no shared memory."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from pathlib import Path

import pytest

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI: pip install 'ikd_fast[dali]'")

from ikd_fast.augment import AdaptiveFreqAug
from ikd_fast.dali import CocoImages, DALIDetLoader, KeyedShardSampler
from tests.dali.files import bad_tables, picture, save
from tests.dali.made import IMAGES, write_set

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="counts what Linux shows in /proc"
)


def resources() -> dict[str, set[str] | int]:
    gc.collect()
    mine = f"_{os.getpid()}_"
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "python threads": len(threading.enumerate()),
        "open files": len(os.listdir("/proc/self/fd")),
        "shared memory": {n for n in os.listdir("/dev/shm") if mine in n},
        "children": len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
    }


def assert_gone(before: dict[str, set[str] | int]) -> None:
    """Threads that feed a queue end a moment after they are told to."""
    for _ in range(50):
        after = resources()
        if after == before:
            return
        time.sleep(0.1)
    assert after == before, threading.enumerate()


def loader(root, workers: int, **options):
    images = CocoImages(
        root / "ann.json", root / "images", resize=(70, 50), min_size=1, masks=True, augment=AdaptiveFreqAug()
    )
    batches = KeyedShardSampler(images, 4)
    return DALIDetLoader(
        images, output="torch", batch_sampler=batches, num_workers=workers, device="cpu", threads=2, **options
    )


@pytest.fixture
def root(tmp_path):
    """One file is for DALI to fail on, so that pipelines are built anew."""
    return write_set(tmp_path, replace={4: bad_tables(save(picture()))})


def epochs(root, workers: int, count: int) -> None:
    made = loader(root, workers, on_error="skip")
    for epoch in range(count):
        made.batch_sampler.set_epoch(epoch)
        assert sum(len(images) for images, _, _ in made) == IMAGES - 1


def left_early(root, workers: int) -> None:
    for _ in loader(root, workers, on_error="skip"):
        break


def failed(root, workers: int) -> None:
    def loop() -> None:
        for _ in loader(root, workers, on_error="skip"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()


def raised(root, workers: int) -> None:
    with pytest.raises(ValueError, match=r"4\.jpg"):
        list(loader(root, workers))


def never_begun(root, workers: int) -> None:
    iter(loader(root, workers))


ENDS = {
    "3 epochs": lambda root, n: epochs(root, n, 3),
    "break": left_early,
    "an error of the loop": failed,
    "an error of a file": raised,
    "never begun": never_begun,
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left_behind(root, end: str, workers: int) -> None:
    epochs(root, workers, 1)  # what the libraries open once and keep
    before = resources()
    ENDS[end](root, workers)
    assert_gone(before)
    ENDS[end](root, workers)
    assert_gone(before)


def test_workers_that_stay_go_with_the_loader(root) -> None:
    def three_epochs_and_a_bit() -> None:
        made = loader(root, 2, on_error="skip", persistent_workers=True)
        for _ in range(3):
            assert sum(len(images) for images, _, _ in made) == IMAGES - 1
        next(iter(made))
        assert sum(len(images) for images, _, _ in made) == IMAGES - 1
        assert resources()["children"] == before["children"] + 2

    epochs(root, 2, 1)
    before = resources()
    three_epochs_and_a_bit()
    assert_gone(before)


def test_workers_that_stay_do_not_wait_for_the_collector(root) -> None:
    """Freed by the collector, together with what they wait for, each worker would take five seconds to end."""
    made = loader(root, 1, on_error="skip", persistent_workers=True)
    for _ in range(2):
        assert sum(len(images) for images, _, _ in made) == IMAGES - 1
    there = weakref.ref(made)
    gc.disable()
    try:
        del made
        assert there() is None
    finally:
        gc.enable()


def test_close_ends_them_at_once_and_the_loader_goes_on(root) -> None:
    epochs(root, 1, 1)
    before = resources()
    made = loader(root, 1, on_error="skip", persistent_workers=True)
    for _ in range(2):
        assert sum(len(images) for images, _, _ in made) == IMAGES - 1
        assert resources()["children"] == before["children"] + 1
        made.close()
        assert resources()["children"] == before["children"]
    made.close()
