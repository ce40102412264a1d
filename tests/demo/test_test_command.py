"""``ikd-fast test``: a checkpoint that does not fit is an error, not the score of random weights; ``train``: errors stay visible."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ikd_fast import cli
from ikd_fast.demo import configs
from ikd_fast.demo.coco import find_splits

from mmdet.registry import MODELS


@pytest.fixture
def config(tiny_coco: Path, tmp_path: Path) -> Path:
    cfg = configs.load("student.py", find_splits(tiny_coco))
    cfg.work_dir = str(tmp_path / "work")
    cfg.dump(tmp_path / "student.py")
    return tmp_path / "student.py"


@pytest.fixture
def weights(tiny_coco: Path) -> dict[str, torch.Tensor]:
    return MODELS.build(configs.load("student.py", find_splits(tiny_coco)).model).state_dict()


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, " ".join((result.stdout + result.stderr).split())


def test_nothing_matches(config: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {"conv1.weight": torch.ones(1)}}, tmp_path / "other.pth")
    code, text = run("test", config, tmp_path / "other.pth")
    assert code == 1
    assert "missing in the checkpoint: backbone." in text
    assert "1 unexpected in the checkpoint: conv1.weight" in text


def test_missing_weights_and_other_shapes(config: Path, weights: dict, tmp_path: Path) -> None:
    key = "neck.fpn_convs.0.conv.bias"
    torch.save({k: v for k, v in weights.items() if k != key}, tmp_path / "less.pth")
    code, text = run("test", config, tmp_path / "less.pth")
    assert code == 1
    assert f"1 missing in the checkpoint: {key}. Check" in text
    torch.save({**weights, key: torch.ones(3)}, tmp_path / "shape.pth")
    code, text = run("test", config, tmp_path / "shape.pth")
    assert code == 1
    assert f"1 of another shape: {key} (checkpoint [3], model [" in text


def test_no_checkpoint_at_all(config: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_text("hello")
    torch.save([1], tmp_path / "list.pth")
    for name, message in (("bad.pth", "bad.pth is not a checkpoint"), ("list.pth", "found a list")):
        code, text = run("test", config, tmp_path / name)
        assert code == 1
        assert message in text
    assert not (tmp_path / "work").exists()  # said before anything is built


def test_whole_weights_are_evaluated_whatever_else_is_there(
    config: Path, weights: dict, tmp_path: Path
) -> None:
    torch.save({"state_dict": {**weights, "kd.losses.0.w": torch.ones(1)}}, tmp_path / "epoch_1.pth")
    code, text = run("test", config, tmp_path / "epoch_1.pth", "--json")
    assert code == 0, text


def test_an_error_while_building_is_not_buried_under_the_config(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, text = run("train", config, "--cfg-options", "model.neck.type=NoSuchNeck")
    console = text + capfd.readouterr().out
    assert code == 1
    assert "NoSuchNeck" in text
    assert "System environment" not in console
    assert "train_dataloader" not in console
    logs = "".join(path.read_text() for path in (tmp_path / "work").rglob("*.log"))
    assert "System environment" in logs
    assert "train_dataloader" in logs
