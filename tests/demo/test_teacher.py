"""The shipped teacher is what its facts say, and packing loses no more than half precision does."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ikd_fast.demo import configs
from ikd_fast.demo.coco import find_splits
from ikd_fast.demo.errors import DemoError
from ikd_fast.demo.run import Options, run
from ikd_fast.demo.teacher import SHIPPED, check_teacher, fingerprint, pack, read_teacher, write_pth
from ikd_fast.distill.teacher import read_weights

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope


def test_shipped_facts() -> None:
    facts = json.loads(SHIPPED.with_suffix(".json").read_text())
    data = SHIPPED.read_bytes()
    assert facts["sha256"] == hashlib.sha256(data).hexdigest()
    assert facts["bytes"] == len(data) <= 8_000_000
    assert facts["val"]["AP50"] >= 0.35
    assert facts["command"].startswith("ikd-fast demo --train-teacher")
    assert {"torch", "mmdet"} <= set(facts["versions"])


def test_shipped_weights_fit_their_config_and_are_finite() -> None:
    init_default_scope("mmdet")
    model = MODELS.build(Config.fromfile(configs.demo_folder() / "teacher.py").model)
    weights = read_teacher(SHIPPED)
    model.load_state_dict(weights, strict=True)
    assert all(bool(value.isfinite().all()) for value in weights.values())
    assert all(value.dtype in (torch.float32, torch.int64) for value in weights.values())


def test_pack_rounds_to_half_and_keeps_counters(tmp_path: Path) -> None:
    weights = {"w": torch.linspace(-3, 3, 1001), "n": torch.tensor(12345678)}
    pack(tmp_path / "t.safetensors", weights, {"steps": 3})
    back = read_weights(tmp_path / "t.safetensors")
    assert back["n"] == 12345678
    assert torch.equal(back["w"], weights["w"].half().float())
    facts = json.loads((tmp_path / "t.json").read_text())
    assert facts["steps"] == 3
    assert facts["bytes"] == (tmp_path / "t.safetensors").stat().st_size


def test_pth_and_safetensors_read_the_same(tmp_path: Path) -> None:
    weights = {"w": torch.arange(4.0)}
    write_pth(tmp_path / "t.pth", weights, ("tree",))
    pack(tmp_path / "t.safetensors", weights, {})
    assert torch.equal(read_teacher(tmp_path / "t.pth")["w"], read_teacher(tmp_path / "t.safetensors")["w"])


def test_a_missing_teacher_is_wrong_usage(tmp_path: Path) -> None:
    for read in (read_teacher, fingerprint):
        with pytest.raises(DemoError, match=r"--teacher .*no.pth: no such file") as caught:
            read(tmp_path / "no.pth")
        assert caught.value.usage


def test_a_teacher_of_other_weights_is_refused_before_the_folder_is_claimed(
    tiny_coco: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "plain.pth"
    torch.save({"backbone.w": torch.ones(2)}, wrong)
    options = Options(out=tmp_path / "out", data=tiny_coco, teacher=wrong, steps=2)
    with pytest.raises(
        DemoError, match=r"--teacher .*plain.pth: .* missing in the checkpoint: .*1 unexpected .*backbone.w"
    ) as caught:
        run(options, Console(quiet=True))
    assert caught.value.usage
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_other_classes_is_refused_and_the_right_one_accepted(
    tiny_coco: Path, tmp_path: Path
) -> None:
    splits = find_splits(tiny_coco)
    with pytest.raises(DemoError, match=r"of another shape: .*for 2 classes"):
        check_teacher(SHIPPED, splits)
    weights = MODELS.build(configs.load("teacher.py", splits).model).state_dict()
    write_pth(tmp_path / "t.pth", weights, ("red", "green"))
    check_teacher(tmp_path / "t.pth", splits)


@pytest.mark.parametrize("value", [[1, 2], torch.ones(2), {"a": 1}])
def test_a_teacher_file_without_weights(tiny_coco: Path, tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "t.pth")
    with pytest.raises(ValueError, match=r"t.pth (is not a checkpoint|holds no weights): expected"):
        check_teacher(tmp_path / "t.pth", find_splits(tiny_coco))


def test_fresh_teacher_training_deletes_only_its_own(
    tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ikd_fast.demo import run as module

    found: list[bool] = []

    def made(work_dir: Path, *_: object, **__: object) -> dict:
        found.append((work_dir / "epoch_1.pth").is_file())
        (work_dir / "epoch_1.pth").write_bytes(b"x")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "prepare", lambda *_, **__: tiny_coco)
    monkeypatch.setattr(module, "train_teacher", made)
    for fresh in (False, False, True):  # the second goes on, the third starts over
        with pytest.raises(KeyboardInterrupt):
            module.train_demo_teacher(Options(out=tmp_path / "ours", fresh=fresh), Console(quiet=True))
    assert found == [False, True, False]
    with pytest.raises(DemoError, match="seed: 0 there, 1 now"):
        module.train_demo_teacher(Options(out=tmp_path / "ours", seed=1), Console(quiet=True))
    (tmp_path / "theirs/teacher").mkdir(parents=True)
    (tmp_path / "theirs/teacher/mine.pth").write_bytes(b"mine")
    with pytest.raises(DemoError, match="write or delete teacher/ there"):
        module.train_demo_teacher(Options(out=tmp_path / "theirs", fresh=True), Console(quiet=True))
    assert (tmp_path / "theirs/teacher/mine.pth").read_bytes() == b"mine"
