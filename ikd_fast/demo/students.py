"""One student: trained (or resumed, or already there), exported, evaluated. Imports mmdet."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ikd_fast.mmdet  # noqa: F401  (makes mmdet importable without compiled operators)
from ikd_fast.demo import configs
from ikd_fast.demo.coco import Split
from ikd_fast.demo.evaluate import evaluate, load_model
from ikd_fast.demo.plan import STUDENTS, TITLES, Epochs
from ikd_fast.demo.report import Report
from ikd_fast.demo.teacher import write_pth
from ikd_fast.demo.train import train
from ikd_fast.distill.teacher import read_weights
from ikd_fast.files import write_json
from ikd_fast.mmdet.export import export
from ikd_fast.mmdet.history import seconds_per_step

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner import set_random_seed


@dataclass(frozen=True)
class Student:
    """A student of a run: its name in :data:`STUDENTS`, its seed, the run's folder, whether the seed is the run's first, its loader."""

    name: str
    seed: int
    out: Path
    first: bool = True
    loader: str = "torch"

    @property
    def work_dir(self) -> Path:
        return self.out / "work" / f"seed{self.seed}" / self.name

    @property
    def checkpoint(self) -> Path:
        """The plain mmdet checkpoint that is the result."""
        return self.out / f"student_{self.name}{'' if self.first else f'_seed{self.seed}'}.pth"

    @property
    def title(self) -> str:
        return TITLES[self.name] + ("" if self.first else f" (seed {self.seed})")


def student_config(student: Student, splits: dict[str, Split], epochs: Epochs, teacher: Path) -> Config:
    """The student's training config: data, teacher, length, seed, loader, the common initial weights or the last checkpoint."""
    cfg = configs.load(STUDENTS[student.name], splits)
    if cfg.model.type == "IKDDistiller":
        cfg.model.teacher_config = configs.load("teacher.py", splits).model
        cfg.model.teacher_ckpt = str(teacher)
    init = initial_weights(student, splits)
    configs.set_run(cfg, student.work_dir, epochs, seed=student.seed, init=init, loader=student.loader)
    return cfg


def initial_weights(student: Student, splits: dict[str, Split]) -> Path:
    """The random weights that all students of a seed start from, drawn once."""
    path = student.work_dir.parent / "init.pth"
    if not path.is_file():
        cfg = configs.load("student.py", splits)
        set_random_seed(student.seed)
        model = MODELS.build(cfg.model)
        model.init_weights()
        write_pth(path, model.state_dict(), splits["train"].classes)
    return path


def student_result(
    student: Student, splits: dict[str, Split], epochs: Epochs, teacher: Path, report: Report
) -> dict[str, Any]:
    """Train what is not trained, evaluate what is not evaluated: ``{"val", "test", "seconds_per_step"}``."""
    path = student.work_dir / "result.json"
    if path.is_file() and student.checkpoint.is_file():
        report.skip(student.name, epochs.steps)
        report.say(f"  {student.title}: finished before")
        return json.loads(path.read_text())
    cfg = student_config(student, splits, epochs, teacher)
    with report.training(student.name, student.title) as advance:
        history = train(cfg, advance)
    export(student.work_dir / f"epoch_{epochs.count}.pth", student.checkpoint)
    result: dict[str, Any] = {
        "val": None,
        "test": None,
        "seconds_per_step": round(seconds_per_step(history), 3),
    }
    weights: dict[str, torch.Tensor] = read_weights(student.checkpoint)
    for name in ("val", "test"):
        if name in splits:
            plain = configs.load("student.py", splits, evaluate=name)
            result[name] = evaluate(load_model(plain, weights), plain, student.work_dir / "console.log")
    write_json(path, result)
    ap50 = 100 * (result["val"]["AP50"] or 0)
    report.say(
        f"  {student.title}: AP50 {ap50:.1f} % on validation, {result['seconds_per_step']:.2f} s a step"
    )
    return result
