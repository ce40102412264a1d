"""A memory of files in mmengine's Runner: kept, found again, named in checkpoints."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")

import ikd_fast.mmdet  # noqa: F401  (before anything imports mmdet)
from ikd_fast.attack.memory.shards import DirectoryStore
from ikd_fast.attack.memory.shards.directory import close_all
from tests.distributed.test_resume import assert_bitwise, keyed_config, train


@pytest.fixture(autouse=True)
def _no_formatting(monkeypatch):
    """mmengine lays every config out with yapf, half a second each."""
    monkeypatch.setattr("mmengine.config.config.FormatCode", lambda text, **_: (text, True))
    yield
    close_all()


def config_for(root, directory, **attack):
    config = keyed_config(root)
    config["train_dataloader"]["dataset"]["pipeline"] = [
        t
        for t in config["train_dataloader"]["dataset"]["pipeline"]
        if t["type"] not in ("CutOut", "AdaptiveFreqAug")
    ]
    config["model"]["adv"] = dict(
        beta=1e-5,
        attack=dict(type="OnlineDIFGSM", mode="carry", memory=dict(directory=str(directory)), **attack),
    )
    return config


def records(directory) -> dict:
    store = DirectoryStore(directory)
    store.open()
    found = {id: store.get(id, torch.device("cpu")) for id in store.ids()}
    store.close()
    return found


@pytest.mark.slow
def test_stopped_at_a_checkpoint_and_resumed_equals_uninterrupted(coco_root, tmp_path) -> None:
    whole, part = (config_for(coco_root, tmp_path / name / "memory") for name in ("full", "cut"))
    _, seen, logs = train(whole, tmp_path / "full")
    train(part, tmp_path / "cut", stop=2)
    close_all()
    before = records(tmp_path / "cut" / "memory")
    assert before
    _, seen_2, logs_2 = train(part, tmp_path / "cut", resume=True)
    assert seen_2 == seen[2:]
    assert logs_2 == logs[2:]
    last = f"iter_{len(seen)}.pth"
    a, b = (torch.load(tmp_path / name / last, weights_only=False) for name in ("full", "cut"))
    assert_bitwise(a["state_dict"], b["state_dict"])
    assert_bitwise(a["optimizer"], b["optimizer"])
    one, two = (records(tmp_path / name / "memory") for name in ("full", "cut"))
    assert one.keys() == two.keys() >= before.keys()
    for id, record in one.items():
        assert (record.size, record.visits, record.step) == (two[id].size, two[id].visits, two[id].step)
        assert torch.equal(record.delta, two[id].delta)
    meta = a["meta"]["ikd_memory"]
    assert meta["directory"] == str(tmp_path / "full" / "memory")
    assert meta["step"] == len(seen) - 1
    assert meta["settings"]["eps"] == 8
    assert len(meta["settings"]["teacher"]) == 16


def test_another_teachers_memory_is_refused(coco_root, tmp_path) -> None:
    config = config_for(coco_root, tmp_path / "memory")
    train(config, tmp_path / "a", stop=1)
    close_all()
    other = config_for(coco_root, tmp_path / "memory", eps=4)
    with pytest.raises(ValueError, match=r"made for other settings \(eps: 8.*there, 4.* now"):
        train(other, tmp_path / "b")
