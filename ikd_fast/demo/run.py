"""The demo from start to end: data, teacher, three students, evaluation, table, pictures, summary. Imports mmdet."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ikd_fast.demo import configs, pictures, summary, table
from ikd_fast.demo.coco import Split, find_splits
from ikd_fast.demo.data import prepare
from ikd_fast.demo.errors import DemoError
from ikd_fast.demo.evaluate import evaluate, load_model
from ikd_fast.demo.loader import LOADERS, check_loader
from ikd_fast.demo.plan import (
    DEFAULT_STEPS,
    QUICK_STEPS,
    STUDENTS,
    TITLES,
    Epochs,
    Settings,
    claim,
    refuse_foreign,
)
from ikd_fast.demo.quiet import quiet
from ikd_fast.demo.report import Report
from ikd_fast.demo.students import Student, student_result
from ikd_fast.demo.teacher import SHIPPED, check_teacher, fingerprint, read_teacher, train_teacher, write_pth
from ikd_fast.files import write_json


@dataclass(frozen=True)
class Options:
    """The command line of ``ikd-fast demo``."""

    out: Path = Path("runs/demo")
    data: Path | None = None
    teacher: Path | None = None
    steps: int | None = None
    seeds: int = 1
    seed: int = 0
    quick: bool = False
    fresh: bool = False
    wheel: Path | None = None
    source: Path | None = None
    loader: str = "torch"


def run(options: Options, console: Console) -> dict[str, Any]:
    """Run the demo, or go on where an earlier call with the same options stopped; returns the summary.

    Raises:
        DemoError: bad options or data, with what to write instead.
    """
    started = time.monotonic()
    refuse_foreign(options.out)
    splits, settings = _prepare(options)
    claim(options.out, settings, fresh=options.fresh)
    with quiet(options.out / "work" / "console.log"):
        return _run(options, console, splits, settings, started)


def _run(
    options: Options, console: Console, splits: dict[str, Split], settings: Settings, started: float
) -> dict[str, Any]:
    batch = configs.load("student.py", splits).train_dataloader.batch_size
    epochs = Epochs.of(settings.steps, splits["train"].images, batch)
    seeds = range(options.seed, options.seed + options.seeds)
    report = Report(console)
    for name in STUDENTS:
        report.plan(name, epochs.steps * options.seeds)
    report.say(_welcome(options, splits, epochs))

    teacher_path = options.out / "teacher.pth"
    teacher_weights = _teacher(options, splits, epochs, report)
    write_pth(teacher_path, teacher_weights, splits["train"].classes)
    teacher = _teacher_result(options.out, splits, teacher_weights)
    report.say(
        f"  teacher: AP50 {100 * (teacher['val']['AP50'] or 0):.1f} % on {splits['val'].images} validation images"
    )

    results: dict[int, dict[str, Any]] = {}
    for seed in seeds:
        results[seed] = {"teacher": teacher}
        for name in STUDENTS:
            student = Student(name, seed, options.out, seed == options.seed, options.loader)
            results[seed][name] = student_result(student, splits, epochs, teacher_path, report)

    images = {name: split.images for name, split in splits.items()}
    first = results[options.seed]
    title = "Teacher and students" + (f", seed {options.seed}" if len(results) > 1 else "")
    console.print()
    about: dict[str, Any] = {"steps": epochs.steps, "images": images, "loader": options.loader}
    console.print(table.result_table(first, title=title, **about))
    if len(results) > 1:
        console.print(table.seeds_table(results, **about))
    made = pictures.draw_all(options.out, splits, options.seed, results)
    found = summary.build(settings, epochs.steps, results, time.monotonic() - started)
    path = summary.write(options.out, found)
    report.say(f"\nDone in {found['wall_seconds'] / 60:.1f} min. Numbers: {path}")
    for picture in made:
        report.say(f"  picture: {picture}")
    for checkpoint in sorted(options.out.glob("student_*.pth")):
        report.say(f"  student: {checkpoint}")
    return found


def train_demo_teacher(options: Options, console: Console) -> Path:
    """Train the teacher that the package ships, on the demo's data, and pack it as safetensors; returns the file."""
    if options.data is not None or options.teacher is not None:
        raise DemoError(
            "--train-teacher trains on the demo's own data: leave out --data and --teacher", usage=True
        )
    check_loader(options.loader)
    refuse_foreign(options.out)
    root = prepare(options.out / "data", wheel=options.wheel, source=options.source)
    splits = find_splits(root)
    # The folder carries a state.json as a run's does, so that --fresh knows what it may delete.
    state = Settings(
        options.steps or 0, options.seed, str(root), "--train-teacher", options.quick, options.loader
    )
    claim(options.out, state, fresh=options.fresh)
    report = Report(console)
    target = options.out / "demo_teacher.safetensors"
    with quiet(options.out / "teacher" / "console.log"):
        facts = train_teacher(
            options.out / "teacher", splits, report, seed=options.seed, steps=options.steps, target=target,
            loader=options.loader,
        )  # fmt: skip
    report.say(
        f"Teacher: AP50 {100 * facts['val']['AP50']:.1f} % on validation as packed; {target} ({facts['bytes'] / 1e6:.1f} MB)"
    )
    report.say(f"Use it: ikd-fast demo --teacher {target}")
    return target


def _prepare(options: Options) -> tuple[dict[str, Split], Settings]:
    for name, value in (
        ("--steps", options.steps if options.steps is not None else 1),
        ("--seeds", options.seeds),
    ):
        if value < 1:
            raise DemoError(f"{name} must be at least 1, got {value}", usage=True)
    if options.seed < 0:
        raise DemoError(f"--seed must not be negative, got {options.seed}", usage=True)
    check_loader(options.loader)
    if options.data is not None and (options.wheel or options.source):
        raise DemoError(
            "--wheel and --source say where the demo's own photographs are: leave them out with --data",
            usage=True,
        )
    if options.data is not None:
        root = options.data
        teacher = fingerprint(options.teacher) if options.teacher else "trained here"
    else:
        teacher = fingerprint(options.teacher or SHIPPED)
        root = prepare(options.out / "data", wheel=options.wheel, source=options.source)
    splits = find_splits(root)
    if options.teacher is not None:
        check_teacher(options.teacher, splits)
    steps = options.steps or (QUICK_STEPS if options.quick else DEFAULT_STEPS)
    return splits, Settings(steps, options.seed, str(root), teacher, options.quick, options.loader)


def _teacher(options: Options, splits: dict[str, Split], epochs: Epochs, report: Report) -> dict[str, Any]:
    if options.data is None or options.teacher is not None:
        return read_teacher(options.teacher or SHIPPED)
    target = options.out / "teacher" / "teacher.safetensors"
    if not target.is_file():
        report.say(f"Training a teacher on {options.data} first")
        train_teacher(
            options.out / "teacher", splits, report, seed=options.seed, steps=2 * epochs.steps, target=target,
            loader=options.loader,
        )  # fmt: skip
    return read_teacher(target)


def _teacher_result(out: Path, splits: dict[str, Split], weights: dict[str, Any]) -> dict[str, Any]:
    path = out / "work" / "teacher.json"
    if not path.is_file():
        rows = {}
        for name in ("val", "test"):
            if name in splits:
                cfg = configs.load("teacher.py", splits, evaluate=name)
                rows[name] = evaluate(load_model(cfg, weights), cfg, out / "work" / "evaluation.log")
        write_json(path, {"val": rows["val"], "test": rows.get("test"), "seconds_per_step": None})
    return json.loads(path.read_text())


def _welcome(options: Options, splits: dict[str, Split], epochs: Epochs) -> str:
    sets = ", ".join(f"{s.images} {name} images with {s.boxes} boxes" for name, s in splits.items())
    seeds = f" for each of {options.seeds} seeds" if options.seeds > 1 else ""
    names = ", ".join(TITLES[name] for name in STUDENTS)
    unread = [s for s in splits.values() if s.opened < s.images]
    looked = "".join(
        f"Checked the first {s.opened} of {s.images} {s.name} image files only.\n" for s in unread
    )
    return (
        f"Data: {sets} ({splits['train'].root})\n{looked}"
        f"Images through {LOADERS[options.loader]}.\n"
        f"Training three students{seeds}, {epochs.steps} steps each: {names}. Ctrl-C stops; the same command goes on."
    )
