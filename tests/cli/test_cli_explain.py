"""``ikd-fast explain``: what it says is what the nets do, with and without data and weights."""

from __future__ import annotations

import json

import pytest
import torch

from tests.cli.conftest import written
from tests.mmdet.conftest import retinanet, stock_config, with_ikd


def test_shapes_and_stop_point(ikd, configs) -> None:
    from ikd_fast.mmdet.build import build_detector

    result = ikd("explain", configs["ikd"], "--json", "--size", "70", "130", "--ranks", "2")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["input"] == {"image": [70, 130], "from": "--size", "padded": [96, 160]}
    with torch.no_grad():
        maps = build_detector(retinanet()).eval().extract_feat(torch.zeros(1, 3, 96, 160))
    (loss,) = facts["losses"]
    assert [row["student"] for row in loss["levels"]] == [list(m.shape[1:]) for m in maps]
    assert loss["settings"]["gamma"] == 5e-4  # retinanet's published value, not the class's default
    # 12 images on 2 ranks: 6 each, batches of 4 and 2; 3 epochs of them, half of which is 3.
    assert facts["run"]["epoch_iters"] == 2
    assert facts["stop"] == {"rule": 0.5, "epoch": 1.5, "iter": 3}
    assert [row["term"] for row in facts["images_seen"]] == ["task losses", "kd/fgd", "the attack", "kd/adv"]
    assert [(row["student"], row["teacher"]) for row in facts["images_seen"]] == [
        ("x_data", None), ("x_data", "x_data"), (None, "x_geo"), ("x_adv", "x_adv"),
    ]  # fmt: skip


def test_the_loader_says_how_many_iterations_a_pass_has(configs, coco_root) -> None:
    from ikd_fast.mmdet.explain import run_of
    from ikd_fast.mmdet.launch import load_config

    from mmengine.runner import Runner

    for options in (
        [],
        ["train_dataloader.batch_size=5"],
        ["train_dataloader.batch_size=5", "train_dataloader.drop_last=True"],
    ):
        cfg = load_config(configs["ikd"], work_dir=None, options=options, launcher="none")
        assert run_of(cfg)["epoch_iters"] == len(Runner.build_dataloader(cfg.train_dataloader, seed=0))


def test_without_data_and_without_weights(ikd, tmp_path) -> None:
    config = with_ikd(
        stock_config(tmp_path / "nowhere"), teacher_ckpt="later.pth", allow_random_teacher=False
    )
    path = written(tmp_path / "c.py", config)
    result = ikd("explain", path, "--no-weights")
    assert result.exit_code == 0, result.stderr
    assert "weights not read (--no-weights); the config names later.pth" in result.stdout
    assert "the training images are not here" in result.stdout
    assert "80 x 80 (Resize of the train pipeline), padded to 96 x 96" in result.stdout
    assert "LoadImageFromFile -> LoadAnnotations -> Resize -> PackDetInputs" in result.stdout
    assert "stop     augmentation and adversarial branch off from epoch 16 of 2, iteration ?" in result.stdout
    lines = result.stdout.splitlines()
    assert "  kd/fgd       x_data   x_data   boxes             1" in lines
    assert "  kd/adv       x_adv    x_adv    none              1e-05" in lines
    assert "  0      8       16 x 12 x 12  16 x 12 x 12  none" in lines
    result = ikd("explain", path)
    assert result.exit_code == 1
    assert "later.pth" in result.stderr
    assert "--no-weights leaves it unread" in " ".join(result.stderr.split())


def test_weights_are_counted(ikd, configs, tmp_path, coco_root) -> None:
    weights = torch.load(configs["weights"])["state_dict"]
    config = with_ikd(
        stock_config(coco_root),
        teacher_config=retinanet(),
        teacher_ckpt=str(configs["weights"]),
        allow_random_teacher=False,
    )
    result = ikd("explain", written(tmp_path / "c.py", config))
    assert f"{len(weights)} of {len(weights)} keys loaded from {configs['weights']}" in result.stdout


def test_other_augmentation_and_no_branch(ikd, configs) -> None:
    options = [
        "model.adv=None",
        "model.augment=None",
        "model.stop_at=None",
        "train_dataloader.dataset.pipeline=[]",
    ]
    result = ikd("explain", configs["ikd"], "--cfg-options", *options)
    assert result.exit_code == 0, result.stderr
    assert "800 x 1333 (mmdet's usual scale: the pipeline names none), padded to 800 x 1344" in result.stdout
    assert "x_adv" not in result.stdout
    assert "x_data" not in result.stdout
    assert "from the loader: no pipeline" in result.stdout


@pytest.mark.parametrize("command", ["explain", "preview"])
def test_a_plain_student_is_told_of_init(ikd, configs, command) -> None:
    result = ikd(command, configs["student"])
    assert result.exit_code == 1
    text = " ".join(result.stderr.split())
    assert "the model is a plain RetinaNet; expected one that is distilled" in text
    assert f"ikd-fast init {configs['student']} TEACHER.py CKPT > ikd.py" in text
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["explain", "preview", "train"])
def test_a_loss_that_does_not_exist(ikd, configs, command, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = ikd(command, configs["ikd"], "--cfg-options", "model.losses.0.type=FGDLos")
    assert result.exit_code == 1
    assert "unknown loss 'FGDLos'; valid:" in " ".join(result.stderr.split())
    assert "Did you mean 'FGDLoss'?" in " ".join(result.stderr.split())


def test_a_back_end_that_is_missing(ikd, configs, tmp_path, monkeypatch) -> None:
    import importlib.util

    monkeypatch.chdir(tmp_path)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    path = tmp_path / "w.py"
    path.write_text(
        f"_base_ = '{configs['ikd']}'\nvisualizer = dict(vis_backends=[dict(type='WandbVisBackend')])\n"
    )
    result = ikd("train", path)
    assert result.exit_code == 1
    assert "names WandbVisBackend, and wandb is not installed; pip install wandb" in " ".join(
        result.stderr.split()
    )
    assert not (tmp_path / "work_dirs/w").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "none.py"], "does not exist"),
        (["explain", "CONFIG", "--size", "0", "5"], "--size takes height and width in pixels, got 0 5"),
        (["explain", "CONFIG", "--size", "5"], "requires 2 arguments"),
        (["explain", "CONFIG", "--ranks", "0"], "--ranks must be at least 1, got 0"),
        (["explain", "CONFIG", "stray"], "unexpected stray"),
        (["preview", "CONFIG", "--images", "0"], "--images must be at least 1, got 0"),
        (["preview", "CONFIG", "--sample", "0"], "--sample must be at least 1, got 0"),
        (["preview", "CONFIG", "--seed", "-1"], "--seed must be at least 0, got -1"),
        (["preview", "CONFIG", "--out", "a.gif"], "--out is a picture, .png or .jpg or .jpeg; got 'a.gif'"),
    ],
)
def test_wrong_usage_is_2(ikd, tmp_path, arguments, message) -> None:
    path = written(tmp_path / "c.py", dict(model=dict(type="IKDDistiller")))
    result = ikd(*(path if a == "CONFIG" else a for a in arguments))
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.exit_code == 2


def test_a_config_without_a_model(ikd, tmp_path) -> None:
    result = ikd("explain", written(tmp_path / "c.py", dict(a=1)))
    assert result.exit_code == 1
    assert "has no model: expected a config of mmdet with model=dict(type='IKDDistiller', ...)" in " ".join(
        result.stderr.split()
    )


def test_interrupt(ikd, configs, monkeypatch) -> None:
    from ikd_fast.mmdet import explain

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(explain, "explain", stopped)
    result = ikd("explain", configs["ikd"])
    assert result.exit_code == 130
    assert "Interrupted." in result.stderr
