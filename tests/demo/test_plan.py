"""Epochs of a run, and a folder that belongs to one set of settings."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
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
        "student_mine.pth",
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
    assert left == ["data/train/a.png", "notes.txt", "student_mine.pth"]
    assert not claim(tmp_path, replace(SETTINGS, steps=400), fresh=True)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "work/a.txt",
        "pictures/me.png",
        "teacher/t",
        "teacher.pth",
        "student_alone.pth",
        "student_fgd_seed1.pth",
    ],
)
def test_a_folder_without_our_state_is_left_alone(tmp_path: Path, name: str, fresh: bool) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(DemoError, match=rf"no state.json of one.*{name.split('/')[0]}") as caught:
        claim(tmp_path, SETTINGS, fresh=fresh)
    assert caught.value.usage
    with pytest.raises(DemoError):
        clear(tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / name]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"state": "CA"}', "\udcff"])
def test_a_state_that_is_not_ours(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "work").mkdir()
    with pytest.raises(DemoError, match="write or delete state.json, work/ there"):
        claim(tmp_path, SETTINGS, fresh=True)
    assert (tmp_path / "work").is_dir()
    (tmp_path / "state.json").write_text(json.dumps(asdict(SETTINGS)))
    assert not claim(tmp_path, replace(SETTINGS, steps=1), fresh=True)
    assert not (tmp_path / "work").exists()


def test_fresh_takes_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine.png").write_bytes(b"mine")
    claim(tmp_path / "run", SETTINGS, fresh=False)
    (tmp_path / "run/pictures").symlink_to(tmp_path / "elsewhere")
    clear(tmp_path / "run")
    assert not (tmp_path / "run/pictures").is_symlink()
    assert (tmp_path / "elsewhere/mine.png").read_bytes() == b"mine"
