"""The teacher: shipped with the package, or trained and packed here. Imports mmdet."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ikd_fast.demo import configs
from ikd_fast.demo.coco import Split
from ikd_fast.demo.data import ASSETS
from ikd_fast.demo.errors import DemoError
from ikd_fast.demo.evaluate import evaluate, load_model
from ikd_fast.demo.plan import TITLES, Epochs
from ikd_fast.demo.report import Report
from ikd_fast.demo.summary import versions
from ikd_fast.demo.train import train
from ikd_fast.distill.teacher import load_strict, read_weights
from ikd_fast.files import write_bytes, write_json
from ikd_fast.mmdet.compat import load_checkpoint
from ikd_fast.mmdet.export import read_checkpoint, student_weights
from ikd_fast.mmdet.history import seconds_per_step

from mmdet.registry import MODELS

SHIPPED = ASSETS / "demo_teacher.safetensors"


def read_teacher(path: Path) -> dict[str, torch.Tensor]:
    """Weights of a ``.pth`` or ``.safetensors`` checkpoint; half-precision ones as float32."""
    if not path.is_file():
        raise DemoError(f"--teacher {path}: no such file", usage=True)
    if path.suffix != ".safetensors":
        read_checkpoint(path)  # says in one line what is wrong with a file that is no checkpoint
    return read_weights(path)


def check_teacher(path: Path, splits: dict[str, Split]) -> None:
    """Raise unless ``path`` holds exactly the weights of ``configs/demo/teacher.py`` with the data's classes."""
    weights = read_teacher(path)
    model = MODELS.build(configs.load("teacher.py", splits).model)
    try:
        load_strict(model, weights)
    except ValueError as error:
        classes = len(splits["train"].classes)
        raise DemoError(
            f"--teacher {path}: {error}. It must be a checkpoint of configs/demo/teacher.py for {classes} classes; "
            "without --teacher, one is trained on --data first, and without --data the shipped one is used",
            usage=True,
        ) from None


def write_pth(path: Path, weights: dict[str, torch.Tensor], classes: tuple[str, ...]) -> None:
    """A plain mmdet checkpoint: ``state_dict`` and the class names."""
    import io

    buffer = io.BytesIO()
    torch.save({"meta": {"dataset_meta": {"classes": classes}}, "state_dict": weights}, buffer)
    write_bytes(path, buffer.getvalue())


def pack(path: Path, weights: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write ``weights`` as float16 safetensors and the facts, with the file's SHA-256, as JSON beside it."""
    from safetensors.torch import save

    half = {
        key: value.half().contiguous() if value.is_floating_point() else value
        for key, value in weights.items()
    }
    data = save(half)
    write_bytes(path, data)
    write_json(
        path.with_suffix(".json"), {**facts, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    )


def fingerprint(path: Path) -> str:
    """What identifies a teacher checkpoint in a run's settings: its SHA-256."""
    if not path.is_file():
        raise DemoError(f"--teacher {path}: no such file", usage=True)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def shipped_facts() -> dict[str, Any]:
    """How the shipped teacher was made and what it reaches."""
    return json.loads(SHIPPED.with_suffix(".json").read_text())


def train_teacher(
    work_dir: Path,
    splits: dict[str, Split],
    report: Report,
    *,
    seed: int,
    steps: int | None,
    target: Path,
    loader: str = "torch",
) -> dict[str, Any]:
    """Train ``configs/demo/teacher.py`` (resuming where it stopped), pack it as ``target`` and evaluate what was packed.

    Returns the facts written beside ``target``: ``val`` scores, ``steps``, ``seed``, ``versions``, ``sha256``, ``bytes``.
    """
    cfg = configs.load("teacher.py", splits)
    epochs = Epochs.of(steps or cfg.teacher_steps, splits["train"].images, cfg.train_dataloader.batch_size)
    report.plan("teacher", epochs.steps)
    test = configs.load("teacher.py", splits)
    configs.set_run(cfg, work_dir, epochs, seed=seed, init=None, loader=loader)
    with report.training("teacher", TITLES["teacher"]) as advance:
        history = train(cfg, advance)
    weights = student_weights(load_checkpoint(work_dir / f"epoch_{epochs.count}.pth"))
    facts = {
        "command": f"ikd-fast demo --train-teacher --seed {seed}"
        + (f" --steps {steps}" if steps else "")
        + (f" --loader {loader}" if loader != "torch" else ""),
        "config": "configs/demo/teacher.py",
        "steps": epochs.steps,
        "seed": seed,
        "seconds_per_step": round(seconds_per_step(history), 3),
        "versions": versions(loader),
    }
    pack(target, weights, facts)
    facts = json.loads(target.with_suffix(".json").read_text())
    facts["val"] = evaluate(load_model(test, read_teacher(target)), test, work_dir / "console.log")
    write_json(target.with_suffix(".json"), facts)
    return facts
