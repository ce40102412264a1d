"""``ikd-fast init``: what it prints trains, and what would not is said with a remedy that works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ikd_fast.losses.presets import preset_values
from tests.cli.conftest import written
from tests.mmdet.conftest import retinanet
from tests.mmdet.detectors import small


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_the_printed_config_trains_from_any_folder(ikd, configs, tmp_path, monkeypatch) -> None:
    from mmengine.config import Config

    folder = configs["folder"]
    monkeypatch.chdir(folder)
    result = ikd("init", "student.py", "teacher.py", "teacher.pth")
    assert result.exit_code == 0, result.stderr
    (folder / "ikd.py").write_text(result.stdout)
    assert "note: preset 'retinanet': the published numbers for RetinaNet" in result.stderr
    weights = len(torch.load(configs["weights"])["state_dict"])
    assert f"note: {weights} of {weights} weights of the teacher are in teacher.pth" in result.stderr

    model = Config.fromfile(folder / "ikd.py").model
    plain = Config.fromfile(configs["student"]).model
    assert model.to_dict() == dict(
        type="IKDDistiller",
        student=plain.to_dict(),
        teacher_config=f"{folder}/teacher.py",
        teacher_ckpt=f"{folder}/teacher.pth",
        losses=[dict(type="FGDLoss", preset="retinanet", source="neck.fpn_convs.{i}.conv")],
        adv=dict(beta=1e-5, attack=dict(type="OnlineDIFGSM", mode="single")),
        augment=dict(type="AdaptiveFreqAug"),
        init_student=True,
        stop_at=dict(epoch=2),
    )

    monkeypatch.chdir(tmp_path)
    options = ["train_cfg.max_epochs=1", "val_cfg=None", "val_dataloader=None", "val_evaluator=None"]
    result = ikd("train", folder / "ikd.py", "--cfg-options", *options)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "work_dirs/ikd/epoch_1.pth").is_file()


@pytest.mark.parametrize(
    ("name", "preset", "branch", "levels", "note"),
    [
        ("retinanet", "retinanet", "retinanet", None, "the published numbers for RetinaNet"),
        ("reppoints", "reppoints", "reppoints", None, "the published numbers for RepPointsDetector"),
        ("mask_rcnn", "mask_rcnn", "mask_rcnn", [0, 1, 2, 3], "the published numbers for MaskRCNN"),
        (
            "faster_rcnn",
            "faster_rcnn",
            "mask_rcnn",
            [0, 1, 2, 3],
            "of FGD for FasterRCNN; IKD has none: .* for MaskRCNN",
        ),
        ("gfl", "gfl", "retinanet", None, "of FGD for GFL; IKD has none: .* for RetinaNet"),
        (
            "fcos",
            "retinanet",
            "retinanet",
            None,
            "no preset is of FCOS; these numbers are published for RetinaNet",
        ),
    ],
)
def test_presets_by_family(tmp_path, monkeypatch, name, preset, branch, levels, note) -> None:
    """The published numbers for the family, or its nearest's, and the config builds a distiller."""
    from ikd_fast.mmdet.init import draft

    from mmdet.registry import MODELS
    from mmengine.config import Config

    monkeypatch.chdir(tmp_path)
    plain = dict(model=small(name), train_cfg=dict(type="IterBasedTrainLoop", max_iters=90))
    path = str(written(tmp_path / "plain.py", plain))
    found = draft(path, path, "https://example.org/teacher.pth")
    assert found.problems == []
    (said,) = [line for line in found.notes if line.startswith("preset ")]
    assert re.fullmatch(f"preset {preset!r}: .*{note}", said)
    (tmp_path / "ikd.py").write_text(found.text)
    model = Config.fromfile(tmp_path / "ikd.py").model
    assert model.losses[0].preset == preset
    assert model.losses[0].get("source") == (None if name == "fcos" else "neck.fpn_convs.{i}.conv")
    assert model.adv.beta == preset_values(branch, "IKD")["beta"] == (2.5e-7 if levels else 1e-5)
    assert model.adv.get("loss", {}).get("levels") == levels
    assert model.stop_at == dict(iter=60)
    assert bool(model.get("init_student")) == (levels is None)
    built = MODELS.build(model | dict(teacher_ckpt=None, allow_random_teacher=True))
    assert list(built.ikd.losses[0]._channels) == (levels or [0, 1, 2, 3, 4])


def sides(tmp_path: Path, student: dict, teacher: dict) -> tuple[str, str]:
    return tuple(
        str(written(tmp_path / f"{name}.py", dict(model=model)))
        for name, model in (("s", student), ("t", teacher))
    )


def test_fewer_levels(tmp_path, monkeypatch) -> None:
    from ikd_fast.mmdet.init import draft

    from mmdet.registry import MODELS

    monkeypatch.chdir(tmp_path)
    teacher = retinanet()
    teacher["neck"]["num_outs"] = 3
    teacher["bbox_head"]["anchor_generator"]["strides"] = [8, 16, 32]
    found = draft(*sides(tmp_path, retinanet(), teacher), "https://example.org/t.pth")
    (problem,) = found.problems
    assert "4 levels of strides [8, 16, 32, 64], the teacher's 3 of strides [8, 16, 32]" in problem
    assert "levels=[0, 1, 2] in the losses" in problem
    assert f"# NOT READY: {problem}" in found.text
    config = dict(
        type="IKDDistiller", student=retinanet(), teacher_config=teacher, allow_random_teacher=True,
        losses=[dict(type="FGDLoss", levels=[0, 1, 2])],
        adv=dict(attack=dict(type="OnlineDIFGSM"), loss=dict(type="AdvFeatureLoss", levels=[0, 1, 2])),
    )  # fmt: skip
    MODELS.build(config)


def test_other_strides(tmp_path, monkeypatch) -> None:
    """The taps in the message give equal strides."""
    from ikd_fast.mmdet.facts import collect
    from ikd_fast.mmdet.init import draft

    from mmdet.registry import MODELS

    monkeypatch.chdir(tmp_path)
    student, teacher = small("gfl"), small("faster_rcnn")
    found = draft(*sides(tmp_path, student, teacher), "https://example.org/t.pth")
    (problem,) = found.problems
    assert "[8, 16, 32, 64, 128] in the student, [4, 8, 16, 32, 64] in the teacher" in problem
    taps = re.search(
        r"features=(\[.*?\]), teacher_features=(\[.*?\]) \(strides (\[.*?\])\), levels=(\[.*?\])", problem
    )
    features, theirs, strides, levels = map(eval, taps.groups())
    model = MODELS.build(
        dict(
            type="IKDDistiller", student=student, teacher_config=teacher, allow_random_teacher=True,
            features=features, teacher_features=theirs, losses=[dict(type="FGDLoss", levels=levels)],
        )
    )  # fmt: skip
    assert [row["stride"] for row in collect(model)["losses"][0]["levels"]] == strides == [8, 16, 32]


def test_fewer_classes_more_classes_and_other_weights(tmp_path, monkeypatch, ikd) -> None:
    from ikd_fast.mmdet.build import build_detector

    monkeypatch.chdir(tmp_path)
    s, t = sides(tmp_path, retinanet(classes=3), retinanet(classes=2))
    torch.save(build_detector(retinanet(12, classes=2)).state_dict(), tmp_path / "wide.pth")
    result = ikd("init", s, t, "wide.pth")
    assert result.exit_code == 1
    text = one_line(result.stderr)
    assert "the teacher has fewer classes, 2 for the student's 3" in text
    assert "objective='feature'" in text
    assert "wide.pth: the checkpoint does not fit RetinaNet" in text
    assert "the config does not train as it was printed" in text
    assert result.stdout.count("# NOT READY: ") == 2
    result = ikd("init", t, s, "https://example.org/t.pth")
    assert result.exit_code == 0
    assert "the teacher has 3 classes, the student 2: class id k must mean the same" in one_line(
        result.stderr
    )
    assert "was not looked at" in result.stderr


def test_classes_in_another_order(tmp_path, monkeypatch, ikd) -> None:
    from ikd_fast.mmdet.build import build_detector

    monkeypatch.chdir(tmp_path)
    s, t = sides(tmp_path, retinanet(classes=2), retinanet(12, classes=2))
    text = (tmp_path / s).read_text()
    data = "train_dataloader = dict(dataset=dict(type='RepeatDataset', dataset=dict(metainfo=dict(classes=('square', 'disc')))))"
    (tmp_path / s).write_text(f"{text}\n{data}\n")
    weights = build_detector(retinanet(12, classes=2)).state_dict()
    for names, code in ((("Square", "disc"), 0), (("disc", "square"), 1)):
        torch.save(dict(state_dict=weights, meta=dict(dataset_meta=dict(classes=names))), tmp_path / "t.pth")
        result = ikd("init", s, t, "t.pth")
        assert result.exit_code == code
        assert ("class names differ at 2 of 2 positions" in one_line(result.stderr)) == bool(code)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["none.py", "teacher.py", "teacher.pth"], 2, "STUDENT none.py: no such file"),
        (["student.py", "mmdet::retinanet/none.py", "teacher.pth"], 2, "TEACHER mmdet::retinanet/none.py:"),
        (["student.py", "teacher.py", "none.pth"], 2, "CKPT none.pth: no such file"),
        (["distilled.py", "teacher.py", "teacher.pth"], 1, "give the plain config of that detector"),
        (["student.py", "empty.py", "teacher.pth"], 1, "TEACHER empty.py has no model"),
        (["lazy.py", "teacher.py", "teacher.pth"], 1, "is a new-style config"),
        (["detr.py", "teacher.py", "teacher.pth"], 1, "a Linear has no neck"),
        (["student.py", "teacher.py"], 2, "Missing argument"),
    ],
)
def test_what_cannot_be_started_from(ikd, configs, monkeypatch, arguments, code, message) -> None:
    from mmdet.registry import MODELS

    folder = configs["folder"]
    monkeypatch.chdir(folder)
    monkeypatch.setitem(MODELS.module_dict, "PlainLinear", torch.nn.Linear)
    (folder / "empty.py").write_text("a = 1\n")
    (folder / "lazy.py").write_text(
        "from mmengine.config import read_base\nwith read_base():\n    from .x import *\n"
    )
    (folder / "detr.py").write_text("model = dict(type='PlainLinear', in_features=1, out_features=1)\n")
    result = ikd("init", *arguments)
    assert message in one_line(result.stderr.replace("│", " "))
    assert result.exit_code == code
    assert result.stdout == ""


def test_imports_of_the_student_are_kept(tmp_path, monkeypatch) -> None:
    from ikd_fast.mmdet.init import draft

    from mmengine.config import Config

    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    config = dict(model=retinanet(), custom_imports=dict(imports=["json", "ikd_fast.mmdet"]))
    student = written(tmp_path / "deep/s.py", config)
    found = draft(str(student), "deep/s.py", "https://example.org/t.pth")
    assert '_base_ = "./deep/s.py"' in found.text
    (tmp_path / "ikd.py").write_text(found.text)
    cfg = Config.fromfile(tmp_path / "ikd.py")
    assert cfg.custom_imports.imports == ["ikd_fast.mmdet", "json"]
    assert cfg.model.stop_at == 0.667
    assert any("stop_at is a fraction" in note for note in found.notes)
