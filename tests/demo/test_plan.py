"""Epochs of a run, and a folder that belongs to one set of settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ikd_fast.demo.errors import DemoError
from ikd_fast.demo.plan import Epochs, Settings, claim, clear

SETTINGS = Settings(steps=300, seed=0, data="runs/demo/data", teacher="abc", quick=False)


@pytest.mark.parametrize(
    ("steps", "images", "batch", "count", "length"),
    [
        (300, 86, 8, 30, 10),  # 86 // 8 = 10 steps are a pass
        (250, 86, 8, 25, 10),
        (8, 86, 8, 2, 4),
        (1, 86, 8, 1, 1),
        (2000, 118287, 8, 20, 100),  # a large set: twenty stretches, not one endless epoch
        (7, 3, 2, 7, 1),
    ],
)
def test_epochs_by_hand(steps: int, images: int, batch: int, count: int, length: int) -> None:
    assert Epochs.of(steps, images, batch) == Epochs(count, length)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 16))
def test_never_fewer_steps_than_asked_and_few_more(steps: int, images: int, batch: int) -> None:
    batch = min(batch, images)
    epochs = Epochs.of(steps, images, batch)
    assert steps <= epochs.steps < steps + epochs.count
    assert epochs.length <= images // batch


def test_the_same_settings_resume(tmp_path: Path) -> None:
    assert not claim(tmp_path, SETTINGS, fresh=False)
    assert claim(tmp_path, SETTINGS, fresh=False)


def test_other_settings_are_named_and_nothing_is_lost(tmp_path: Path) -> None:
    claim(tmp_path, SETTINGS, fresh=False)
    (tmp_path / "student_fgd.pth").write_bytes(b"weights")
    with pytest.raises(DemoError, match=r"steps: 300 there, 400 now; seed: 0 there, 1 now") as caught:
        claim(tmp_path, replace(SETTINGS, steps=400, seed=1), fresh=False)
    assert caught.value.usage
    assert "--fresh" in str(caught.value)
    assert (tmp_path / "student_fgd.pth").read_bytes() == b"weights"


def test_fresh_deletes_the_run_and_nothing_else(tmp_path: Path) -> None:
    claim(tmp_path, SETTINGS, fresh=False)
    for name in (
        "data/train/a.png",
        "work/seed0/fgd/epoch_1.pth",
        "notes.txt",
        "student_fgd.pth",
        "pictures/batch.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    clear(tmp_path)
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["data/train/a.png", "notes.txt"]
    assert not claim(tmp_path, replace(SETTINGS, steps=400), fresh=True)
