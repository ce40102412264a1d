"""The shipped teacher is what its facts say, and packing loses no more than half precision does."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from ikd_fast.demo import configs
from ikd_fast.demo.errors import DemoError
from ikd_fast.demo.teacher import SHIPPED, fingerprint, pack, read_teacher, write_pth
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
