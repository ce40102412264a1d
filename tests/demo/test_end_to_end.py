"""The whole demo on a tiny data set: results, resume, and that nothing is done twice."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ikd_fast.demo import configs, run, students
from ikd_fast.demo.coco import find_splits
from ikd_fast.demo.errors import DemoError
from ikd_fast.demo.evaluate import load_model
from ikd_fast.demo.plan import STUDENTS, Epochs
from ikd_fast.demo.quiet import quiet
from ikd_fast.demo.teacher import write_pth
from ikd_fast.demo.train import train
from ikd_fast.distill.teacher import read_weights
from ikd_fast.mmdet import launch
from ikd_fast.mmdet.history import read_history

from mmdet.registry import MODELS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tiny_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[run.Options, str]:
    options = run.Options(out=tmp_path_factory.mktemp("out"), data=tiny_coco, steps=2)
    text = io.StringIO()
    run.run(options, Console(file=text, width=100))
    return options, text.getvalue()


def test_it_leaves_what_it_promises(finished) -> None:
    options, text = finished
    found = json.loads((options.out / "summary.json").read_text())
    assert set(found["models"]) == {"teacher", *STUDENTS}
    assert set(found["models"]["fgd_ikd"]) == {"AP", "AP50", "AP_S", "AP_M", "AP_L"}
    assert set(found["seconds_per_step"]) == set(STUDENTS)
    assert (found["steps"], found["seed"]) == (2, 0)
    for picture in ("batch", "detections", "losses"):
        assert (options.out / f"pictures/{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert "student + FGD + IKD" in text
    assert "loss_cls" not in text  # the trainers' own logs are in files
    assert "loss_cls" in (options.out / "work/seed0/fgd/console.log").read_text()


@pytest.mark.parametrize("name", STUDENTS)
def test_each_student_is_a_plain_mmdet_checkpoint(finished, tiny_coco: Path, name: str) -> None:
    options, _ = finished
    weights = read_weights(options.out / f"student_{name}.pth")
    model = MODELS.build(configs.load("student.py", find_splits(tiny_coco)).model)
    assert set(weights) == set(model.state_dict())
    model.load_state_dict(weights, strict=True)


def test_all_students_start_from_the_same_weights_and_see_the_same_images(finished) -> None:
    options, _ = finished
    first = {name: read_history(options.out / f"work/seed0/{name}")[0] for name in STUDENTS}
    # alone and FGD see the same crops; IKD augments them, so its first loss differs
    assert first["alone"]["loss_cls"] == pytest.approx(first["fgd"]["loss_cls"], rel=1e-6)
    assert first["alone"]["loss_bbox"] == pytest.approx(first["fgd"]["loss_bbox"], rel=1e-6)
    assert {"loss_kd/fgd", "loss_kd/adv", "attack/linf"} <= set(first["fgd_ikd"])


def test_the_runners_own_evaluation_gives_the_same_ap(finished, tiny_coco: Path, tmp_path: Path) -> None:
    options, _ = finished
    splits = find_splits(tiny_coco)
    cfg = configs.load("student.py", splits)
    cfg.work_dir = str(tmp_path)
    cfg.experiment_name = "again"
    with quiet(tmp_path / "log"):
        metrics = launch.test(cfg, options.out / "student_fgd.pth")
    ours = json.loads((options.out / "summary.json").read_text())["models"]["fgd"]
    assert metrics.get("coco/bbox_mAP", 0.0) == ours["AP"]
    assert metrics.get("coco/bbox_mAP_50", 0.0) == ours["AP50"]


def test_the_same_command_again_trains_nothing(finished, monkeypatch: pytest.MonkeyPatch) -> None:
    options, _ = finished
    monkeypatch.setattr(students, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(run.pictures, "draw_all", lambda *_: [])
    before = json.loads((options.out / "summary.json").read_text())
    text = io.StringIO()
    again = run.run(options, Console(file=text, width=100))
    assert again["models"] == before["models"]
    assert text.getvalue().count("finished before") == 3


def test_other_steps_are_refused(finished) -> None:
    options, _ = finished
    with pytest.raises(DemoError, match="steps: 2 there, 3 now"):
        run.run(run.Options(out=options.out, data=options.data, steps=3), Console(file=io.StringIO()))


def train_student(name: str, out: Path, root: Path, stop_at: int | None = None) -> list[dict[str, float]]:
    splits = find_splits(root)
    teacher = out / "teacher.pth"
    if not teacher.is_file():
        torch.manual_seed(1)
        write_pth(
            teacher, MODELS.build(configs.load("teacher.py", splits).model).state_dict(), ("red", "green")
        )

    def advance(done: int, total: int) -> None:
        assert total == 4
        if done == stop_at:
            raise KeyboardInterrupt

    with quiet(out / "log"):
        cfg = students.student_config(students.Student(name, 0, out), splits, Epochs(2, 2), teacher)
        cfg.train_dataloader.batch_size = 2
        cfg.train_dataloader.sampler.chunk = 4
        return train(cfg, advance)


def test_stopped_and_resumed_equals_uninterrupted(tiny_coco: Path, tmp_path: Path) -> None:
    name = "fgd_ikd"
    whole = train_student(name, tmp_path / "whole", tiny_coco)
    with pytest.raises(KeyboardInterrupt):
        train_student(name, tmp_path / "cut", tiny_coco, stop_at=3)
    work = tmp_path / "cut/work/seed0" / name
    assert (work / "epoch_1.pth").is_file()
    assert not (work / "epoch_2.pth").exists()
    resumed = train_student(name, tmp_path / "cut", tiny_coco)
    assert [row["step"] for row in resumed] == [0, 1, 2, 3]
    for a, b in zip(whole, resumed, strict=True):
        assert set(a) == set(b)
        for key in set(a) - {"seconds"}:
            assert b[key] == pytest.approx(a[key], rel=1e-6, abs=1e-6), (a["step"], key)
    one, two = (read_weights(tmp_path / d / f"work/seed0/{name}/epoch_2.pth") for d in ("whole", "cut"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-7)


def test_a_model_refuses_weights_that_do_not_fit(tiny_coco: Path) -> None:
    cfg = configs.load("student.py", find_splits(tiny_coco))
    weights = MODELS.build(cfg.model).state_dict()
    weights.pop("neck.fpn_convs.0.conv.bias")
    with pytest.raises(RuntimeError, match=r"Missing key.*neck.fpn_convs.0.conv.bias"):
        load_model(cfg, weights)
