"""The control experiment: what of an attack reaches the student, made in the step, read from PNG, or read from shrunk JPEG.

::

    python -m benchmarks.end_to_end.control --data runs/demo/data --out build/control

Makes the sets (``ikd-fast attack``), measures every source as the student's input sees it, trains the students (``ikd-fast sweep``) and
writes ``control.json`` and ``control.md``. All of it resumes. ``--no-students`` leaves the training out; students of ``--sweeps
NAME=FOLDER`` are read and not trained.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.machine import commit, machine, processor
from ikd_fast.analysis.strength.measures import pixel_change, pyramid_change
from ikd_fast.attack import AttackBatch
from ikd_fast.commands import attack as attack_command
from ikd_fast.commands import sweep as sweep_command
from ikd_fast.distill import StepBatch
from ikd_fast.distill.victim import StepVictim
from ikd_fast.files import write_bytes, write_json

TEACHER, WEIGHTS = "ikd_fast::demo/teacher.py", "ikd_fast::demo_teacher.safetensors"
ONLINE, OFFLINE = "ikd_fast::demo/fgd_ikd.py", "ikd_fast::demo/fgd_ikd_offline.py"
EPS, QUALITY, SHRINK = 8.0, 95, 0.6
"""0.6: a COCO image of 640 x 480 is 1067 x 800 to the net. The demo's tiles are what the net sees."""


@dataclass(frozen=True)
class Source:
    """Where adversarial images come from.

    Attributes:
        attack: arguments of the attack in the step; None: read from a set.
        files: options of ``ikd-fast attack`` that make the set.
        students: whether students are trained from it.
    """

    name: str
    title: str
    attack: dict[str, Any] | None = None
    files: dict[str, Any] = field(default_factory=dict)
    students: bool = True


JPEG = dict(jpeg=QUALITY, save_scale=SHRINK)
SOURCES = (
    Source("random", "random signs, in the step", attack=dict(mode="random_sign"), students=False),
    Source("online", "`single`, in the step", attack=dict(mode="single")),
    Source("png", "`single`, PNG made before", files=dict(mode="single")),
    Source("jpeg", f"`single`, JPEG {QUALITY} at {SHRINK:g} of the size", files=dict(mode="single", **JPEG)),
    Source("blur", "no perturbation, the same JPEG", files=dict(mode="random_sign", eps=0.0, **JPEG), students=False),
)  # fmt: skip


def options_of(source: Source, home: Path) -> list[str]:
    """``--cfg-options`` of the source's runs."""
    return (
        []
        if source.attack
        else [f"train_dataloader.dataset.pipeline.2.directory={(home / source.name).resolve()}"]
    )


def make_set(source: Source, home: Path, data: Path) -> dict[str, Any]:
    """The source's files; what they do to the whole images they were made for."""
    options = attack_command.Options(
        TEACHER, WEIGHTS, home / source.name, **{"eps": EPS, **source.files}, resize="none", workers=0,
        cfg_options=(f"train_dataloader.dataset.data_root={data}/",),
    )  # fmt: skip
    found = attack_command.generate(options)
    assert found is not None
    return found


def distiller(source: Source, home: Path, data: Path) -> tuple[Any, Any]:
    """Model and training set of the source's config."""
    from ikd_fast.mmdet.explain import build_dataset, build_distiller
    from ikd_fast.mmdet.sweep import setup

    cfg = setup.load(ONLINE if source.attack else OFFLINE, options_of(source, home), data)
    if source.attack:
        cfg.model.adv.attack = dict(type="OnlineDIFGSM", eps=EPS, **source.attack)
    model = build_distiller(cfg, source.name)
    model.set_total_steps(10**9)  # measured in the part of the run where the branch is on
    return model, build_dataset(cfg, source.name)


def seen(model: Any, dataset: Any, epochs: int, batch: int = 8) -> Iterator[dict[str, float]]:
    """One row an image and epoch: what the perturbation is and does behind crop, scale, flip, brightness and the adaptive crop."""
    from ikd_fast.mmdet.samples import to_targets

    from mmengine.dataset import pseudo_collate

    ikd = model.ikd
    (source,) = ikd._teacher_sources([ikd.adv_loss])
    for epoch in range(epochs):
        for transform in dataset.pipeline.transforms:
            if hasattr(transform, "set_epoch"):
                transform.set_epoch(epoch)
        model.set_progress(epoch, epoch)
        for start in range(0, len(dataset), batch):
            rows = [dataset[i] for i in range(start, min(start + batch, len(dataset)))]
            data = model.data_preprocessor(pseudo_collate(rows), True)
            targets, keys = to_targets(data["data_samples"]), data["image_keys"]
            step = StepBatch(
                data["geo"], data["geo"], targets, [t["size"] for t in targets], keys, epoch, epoch,
                adversarial=data.get("adversarial"),
            )  # fmt: skip
            out = ikd.craft(step)
            for i, target in enumerate(targets):
                victim = StepVictim(ikd.teacher, source, ikd.victim, [target["size"]])
                yield measured(victim, ikd.units, step.geo[i : i + 1], out.images[i : i + 1], target, keys[i])


@torch.no_grad()
def measured(
    victim: StepVictim, units: Any, clean: torch.Tensor, moved: torch.Tensor, target: dict[str, Any], key: int
) -> dict[str, float]:
    """Of one image: the teacher's class loss before and after, the change of its maps, the change of pixels."""
    maps, losses = [], []
    for x in (clean, moved):
        found, loss = victim.maps_and_loss(
            AttackBatch(x, [target], [target["size"]], 0, lambda: clean, [key])
        )
        maps.append(found)
        losses.append(float(loss.sum()))
    linf, mean, outside = pixel_change(clean, moved, [target["size"]], units, EPS)[0].tolist()
    return {
        "class_loss": losses[0], "adversarial_class_loss": losses[1], "feature_change": float(pyramid_change(*maps)[0, :, 0].mean()),
        "mean_abs": mean, "linf": linf, "outside": outside,
    }  # fmt: skip


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means, and medians of the losses, which a few images with one small tree dominate."""
    found = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    for name in ("class_loss", "adversarial_class_loss"):
        found[f"{name}_median"] = statistics.median(row[name] for row in rows)
    return {name: round(value, 4) for name, value in found.items()} | {"images": len(rows)}


def train(source: Source, home: Path, data: Path, seeds: int, iters: int, console: Console) -> Path:
    """Students of the source; the folder of the sweep."""
    online = bool(source.attack)
    out = home / f"students-{source.name}"
    options = sweep_command.Options(
        ONLINE if online else OFFLINE, out, [], [EPS] if online else [], [str(source.attack["mode"])] if source.attack else [], seeds,
        iters, baseline=False, data=data, cfg_options=options_of(source, home),
    )  # fmt: skip
    sweep_command.sweep(options, console)
    return out


def students(folder: Path) -> dict[str, Any]:
    """AP and AP50 of each seed, per cent."""
    (setting,) = json.loads((folder / sweep_command.JSON).read_text())["settings"]
    runs = {seed: run["metrics"] for seed, run in sorted(setting["runs"].items())}
    return {
        name: {seed: round(100 * m[f"coco/{key}"], 1) for seed, m in runs.items()}
        for name, key in (("AP", "bbox_mAP"), ("AP50", "bbox_mAP_50"))
    }


def render(report: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "| adversarial images | teacher's class loss, median (clean) | mean | maps changed by | mean abs. delta | beyond eps | "
        "students' AP50 | "
        "seeds | AP | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for source in SOURCES:
        row = report["sources"][source.name]
        s = row["seen"]
        cells = [
            source.title, f"{s['adversarial_class_loss_median']:.2f} ({s['class_loss_median']:.2f})", f"{s['adversarial_class_loss']:.2f}",
            f"{100 * s['feature_change']:.0f} %", f"{s['mean_abs']:.1f}", f"{100 * s['outside']:.0f} %",
        ]  # fmt: skip
        for name in ("AP50", "AP"):
            found = list(row.get("students", {}).get(name, {}).values())
            cells += [f"{statistics.fmean(found):.1f}", ", ".join(map(str, found))] if found else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="the demo's data (`ikd-fast demo --quick` makes it)"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2, help="passes in which the sources are measured")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iters", type=int, default=400)
    parser.add_argument("--no-students", action="store_true")
    parser.add_argument("--sweeps", nargs="*", default=[], metavar="NAME=FOLDER", help="finished sweeps")
    given = parser.parse_args(arguments)
    finished = {name: Path(folder) for name, _, folder in (text.partition("=") for text in given.sweeps)}
    console = Console(file=sys.stderr)
    report: dict[str, Any] = {
        "machine": machine(processor()),
        "commit": commit(),
        "eps": EPS,
        "epochs": given.epochs,
        "iters": given.iters,
        "sources": {},
    }
    for source in SOURCES:
        console.print(source.title, highlight=False)
        row: dict[str, Any] = {"title": source.title}
        if source.attack is None:
            row["files"] = {
                k: v
                for k, v in make_set(source, given.out, given.data).items()
                if k in ("images", "bytes", "summary")
            }
        model, dataset = distiller(source, given.out, given.data)
        row["seen"] = summary(list(seen(model, dataset, given.epochs)))
        if source.name in finished or (source.students and not given.no_students):
            folder = finished.get(source.name) or train(
                source, given.out, given.data, given.seeds, given.iters, console
            )
            row["students"] = students(folder)
        report["sources"][source.name] = row
    write_json(given.out / "control.json", report)
    write_bytes(given.out / "control.md", render(report).encode())
    print(render(report))


if __name__ == "__main__":
    main()
