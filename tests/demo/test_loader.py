"""``--loader dali``: the same trainings, resumed the same way, through DALI; and what is said where DALI is not."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ikd_fast.demo import configs, run, students
from ikd_fast.demo.coco import find_splits
from ikd_fast.demo.errors import DemoError
from ikd_fast.demo.loader import LOADERS, check_loader
from ikd_fast.demo.plan import STUDENTS, Epochs, Settings, claim
from ikd_fast.demo.quiet import quiet
from ikd_fast.demo.summary import build, versions
from ikd_fast.demo.table import result_table
from ikd_fast.demo.teacher import write_pth
from ikd_fast.demo.train import train
from ikd_fast.distill.teacher import read_weights
from ikd_fast.mmdet.history import read_history

from mmdet.registry import MODELS

SETTINGS = Settings(steps=2, seed=0, data="d", teacher="t", quick=False)
OLD = {key: value for key, value in asdict(SETTINGS).items() if key != "loader"}


@pytest.fixture(scope="module")
def dali() -> None:
    """The tests that decode with it."""
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI: make dali, or pip install 'ikd_fast[dali]'")


def test_a_run_from_before_the_choice_is_torchs(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps(OLD))
    assert claim(tmp_path, SETTINGS, fresh=False)
    assert json.loads((tmp_path / "state.json").read_text()) == OLD
    with pytest.raises(DemoError, match="loader: 'torch' there, 'dali' now") as caught:
        claim(tmp_path, replace(SETTINGS, loader="dali"), fresh=False)
    assert caught.value.usage
    (tmp_path / "state.json").write_text(json.dumps({k: v for k, v in OLD.items() if k != "teacher"}))
    (tmp_path / "work").mkdir()
    with pytest.raises(DemoError, match="no state.json of one"):
        claim(tmp_path, SETTINGS, fresh=False)


def test_the_choice_is_part_of_a_run(tmp_path: Path) -> None:
    claim(tmp_path, replace(SETTINGS, loader="dali"), fresh=False)
    assert json.loads((tmp_path / "state.json").read_text())["loader"] == "dali"
    with pytest.raises(DemoError, match="loader: 'dali' there, 'torch' now"):
        claim(tmp_path, SETTINGS, fresh=False)


@pytest.mark.parametrize("teacher_only", [False, True])
def test_without_dali_one_error_names_the_package(
    teacher_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # what `import` then meets is an ImportError
    work = run.train_demo_teacher if teacher_only else run.run
    with pytest.raises(DemoError, match=r"--loader dali: .*pip install nvidia-dali-cuda1[23]0$") as caught:
        work(run.Options(out=tmp_path / "out", loader="dali"), Console(quiet=True))
    assert caught.value.usage
    assert not (tmp_path / "out").exists()


def test_another_name_is_wrong_usage() -> None:
    with pytest.raises(DemoError, match="must be 'torch' or 'dali', got 'DALI'") as caught:
        check_loader("DALI")
    assert caught.value.usage


@pytest.mark.parametrize(("loader", "kind"), [("torch", None), ("dali", "DALIDetLoader")])
def test_the_config_of_a_student(loader: str, kind: str | None, tiny_coco: Path, tmp_path: Path) -> None:
    """Nothing but the loader's type differs: neither the order of images nor the keys of the crops."""
    splits = find_splits(tiny_coco)
    cfg = configs.load("student.py", splits)
    configs.set_run(cfg, tmp_path, Epochs(2, 2), seed=3, init=None, loader=loader)
    assert cfg.train_dataloader.get("type") == kind
    plain = configs.load("student.py", splits)
    configs.set_run(plain, tmp_path, Epochs(2, 2), seed=3, init=None)
    cfg.train_dataloader.pop("type", None)
    assert cfg.train_dataloader == plain.train_dataloader


@pytest.mark.parametrize("loader", LOADERS)
def test_summary_and_table_say_it(loader: str) -> None:
    row = {"val": dict.fromkeys(("AP", "AP50", "AP_S", "AP_M", "AP_L"), 0.5), "test": None}
    results = {name: {**row, "seconds_per_step": None} for name in ("teacher", *STUDENTS)}
    assert build(replace(SETTINGS, loader=loader), 2, {0: results}, 1.0)["loader"] == loader
    text = io.StringIO()
    table = result_table(results, steps=2, images={"train": 3, "val": 3}, title="t", loader=loader)
    Console(file=text, width=80).print(table)
    printed = " ".join(text.getvalue().split())
    named = [title for title in LOADERS.values() if title in printed]
    assert named == [LOADERS[loader]]
    assert any("dali" in name for name in versions()) is False


def student(name: str, out: Path, root: Path, loader: str, stop_at: int | None = None) -> list[dict]:
    """The history of four steps in two epochs of batches of two."""
    splits = find_splits(root)
    teacher = out / "teacher.pth"
    if not teacher.is_file():
        torch.manual_seed(1)
        net = MODELS.build(configs.load("teacher.py", splits).model)
        write_pth(teacher, net.state_dict(), ("red", "green"))

    def advance(done: int, total: int) -> None:
        assert total == 4
        if done == stop_at:
            raise KeyboardInterrupt

    with quiet(out / "log"):
        made = students.Student(name, 0, out, loader=loader)
        cfg = students.student_config(made, splits, Epochs(2, 2), teacher)
        cfg.train_dataloader.batch_size = 2
        cfg.train_dataloader.sampler.chunk = 4
        return train(cfg, advance)


@pytest.mark.slow
def test_two_steps_of_everything(dali: None, tiny_coco: Path, tmp_path: Path) -> None:
    """A teacher and the three students; what is asked for is what ran."""
    text = io.StringIO()
    options = run.Options(out=tmp_path / "out", data=tiny_coco, steps=2, loader="dali")
    found = run.run(options, Console(file=text, width=100))
    assert found["loader"] == "dali"
    assert any(re.fullmatch(r"nvidia-dali-cuda1[23]0", name) for name in found["versions"])
    assert "Images through DALIDetLoader" in text.getvalue()
    facts = json.loads((options.out / "teacher/teacher.json").read_text())
    assert facts["command"].endswith("--loader dali")
    for name in STUDENTS:
        history = read_history(options.out / f"work/seed0/{name}")
        assert [row["step"] for row in history] == [0, 1]
        log = (options.out / f"work/seed0/{name}/console.log").read_text()
        assert re.search(r"type='DALIDetLoader'", log), name  # the config that the Runner was given
    first = {name: read_history(options.out / f"work/seed0/{name}")[0] for name in ("alone", "fgd")}
    assert first["alone"]["loss_cls"] == pytest.approx(first["fgd"]["loss_cls"], rel=1e-6)
    assert (options.out / "pictures/batch.png").is_file()


@pytest.mark.slow
def test_a_training_is_that_of_torchs_loader(dali: None, tiny_coco: Path, tmp_path: Path) -> None:
    """The same images, crops, boxes and, on a CPU, pixels: the same losses and weights, to the bit."""
    name = "fgd_ikd"
    rows = [student(name, tmp_path / loader, tiny_coco, loader) for loader in LOADERS]
    for a, b in zip(*rows, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }
    one, two = (read_weights(tmp_path / d / f"work/seed0/{name}/epoch_2.pth") for d in LOADERS)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(two[key], value), key


@pytest.mark.slow
def test_stopped_and_resumed_equals_uninterrupted(dali: None, tiny_coco: Path, tmp_path: Path) -> None:
    name = "fgd_ikd"
    whole = student(name, tmp_path / "whole", tiny_coco, "dali")
    with pytest.raises(KeyboardInterrupt):
        student(name, tmp_path / "cut", tiny_coco, "dali", stop_at=3)
    work = tmp_path / "cut/work/seed0" / name
    assert (work / "epoch_1.pth").is_file()
    assert not (work / "epoch_2.pth").exists()
    resumed = student(name, tmp_path / "cut", tiny_coco, "dali")
    assert [row["step"] for row in resumed] == [0, 1, 2, 3]
    # float32 sums of the same numbers on the same threads
    for a, b in zip(whole, resumed, strict=True):
        assert set(a) == set(b)
        for key in set(a) - {"seconds"}:
            assert b[key] == pytest.approx(a[key], rel=1e-6, abs=1e-6), (a["step"], key)
    one, two = (read_weights(tmp_path / d / f"work/seed0/{name}/epoch_2.pth") for d in ("whole", "cut"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-7)
