"""The step's scalars in mmengine's back ends, and what a missing back end says."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

import ikd_fast.mmdet  # noqa: F401
from ikd_fast.mmdet.launch import BACKEND_PACKAGES, InputError, check_visualizer
from tests.mmdet.conftest import run, stock_config, with_ikd

from mmengine.config import Config

KEYS = {
    "loss", "loss_cls", "loss_bbox", "loss_kd/fgd", "loss_kd/adv",
    *(f"kd/{name}.{level}" for name in ("fgd", "adv") for level in range(4)),
    "share/cls", "share/bbox", "share/kd/fgd", "share/kd/adv",
    "gradshare/task", "gradshare/kd/fgd", "gradshare/kd/adv",
    "aug/crop_frac", "aug/noise_frac", "attack/linf", "attack/objective", "attack/nonfinite",
    "attack/gradients",
}  # fmt: skip
OF_MMENGINE = {"lr", "data_time", "time", "epoch", "iter", "step", "memory"}


def test_tensorboard_has_every_documented_scalar(coco_root, tmp_path, repo_root: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = with_ikd(stock_config(coco_root, epochs=1, batch_size=6))
    backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
    config.update(val_cfg=None, val_dataloader=None, val_evaluator=None)
    config["visualizer"] = dict(type="DetLocalVisualizer", vis_backends=backends, name=str(tmp_path))
    runner, logs = run(config, tmp_path)
    runner.visualizer.close()
    assert len(logs) == 2
    (folder,) = tmp_path.glob("*/vis_data")
    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["scalars"]) - OF_MMENGINE == KEYS
    for key in KEYS - {"loss", "loss_cls", "loss_bbox", "loss_kd/fgd", "loss_kd/adv"}:
        written = events.Scalars(key)
        assert [e.step for e in written] == [1, 2]
        assert [e.value for e in written] == pytest.approx([log[key] for log in logs], rel=1e-6)  # float32
    # The addends are logged as means over the log's window, here the whole run so far.
    mean = sum(log["loss"] for log in logs) / 2
    assert events.Scalars("loss")[-1].value == pytest.approx(mean, rel=1e-5)
    documented = (repo_root / "docs" / "logging.md").read_text()
    # The table has two levels of a loss, and an ellipsis.
    tabled = {key for key in KEYS if not re.search(r"fgd\.[23]|adv\.[123]", key)}
    assert [key for key in sorted(tabled) if f"`{key}`" not in documented] == []


def test_wandb_gets_the_same_keys(coco_root, tmp_path, monkeypatch) -> None:
    """mmengine's W&B back end on a double of the package, which takes what the real one is given."""
    steps: list[dict] = []
    double = types.ModuleType("wandb")
    double.init = lambda **_: None
    double.config = types.SimpleNamespace(update=lambda *_, **__: None)
    double.run = types.SimpleNamespace(log_code=lambda **_: None)
    double.log = lambda values, **_: steps.append(values)
    double.join = lambda: None
    monkeypatch.setitem(sys.modules, "wandb", double)
    config = with_ikd(stock_config(coco_root, epochs=1, batch_size=12))
    config.update(val_cfg=None, val_dataloader=None, val_evaluator=None)
    backends = [dict(type="WandbVisBackend", init_kwargs=dict(project="ikd"))]
    config["visualizer"] = dict(type="DetLocalVisualizer", vis_backends=backends, name=str(tmp_path))
    _, logs = run(config, tmp_path)
    (step,) = [values for values in steps if "loss" in values]
    assert set(step) - OF_MMENGINE == KEYS
    assert {key: float(step[key]) for key in KEYS} == pytest.approx(
        {key: logs[0][key] for key in KEYS}, rel=1e-6
    )


@pytest.mark.parametrize("kind", sorted(BACKEND_PACKAGES))
def test_a_back_end_without_its_package_says_what_to_write(monkeypatch, kind) -> None:
    package = BACKEND_PACKAGES[kind]
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    cfg = Config(
        dict(visualizer=dict(vis_backends=[dict(type="LocalVisBackend"), dict(type=f"mmengine.{kind}")]))
    )
    with pytest.raises(
        InputError, match=rf"names {kind}, and {package} is not installed; pip install {package}, or write"
    ) as error:
        check_visualizer(cfg)
    # What it says to write is what the check lets pass.
    check_visualizer(Config.fromstring(str(error.value).partition("without it: ")[2], ".py"))


def test_backends_are_mmengines() -> None:
    from mmengine.registry import VISBACKENDS

    assert {kind for kind in VISBACKENDS.module_dict if kind != "LocalVisBackend"} == set(BACKEND_PACKAGES)


@pytest.mark.parametrize(
    "visualizer", [None, dict(vis_backends=None), dict(vis_backends=[dict(type="LocalVisBackend")])]
)
def test_nothing_to_check(visualizer) -> None:
    check_visualizer(Config(dict(visualizer=visualizer)))
