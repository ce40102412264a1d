"""``ikd-fast preview CONFIG``."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ikd_fast.mmdet import launch
from ikd_fast.pictures.branches import draw_branches

SUFFIXES = (".png", ".jpg", ".jpeg")


def run(
    config: Path, *, options: list[str], out: Path, images: int, sample: int, seed: int, as_json: bool
) -> None:
    """Draw ``images`` training images in ``out`` and print what an epoch does to ``sample`` of them."""
    for name, value, least in (("--images", images, 1), ("--sample", sample, 1), ("--seed", seed, 0)):
        if value < least:
            raise launch.InputError(f"{name} must be at least {least}, got {value}", usage=True)
    if out.suffix.lower() not in SUFFIXES:
        raise launch.InputError(f"--out is a picture, {' or '.join(SUFFIXES)}; got {out.name!r}", usage=True)
    with redirect_stdout(sys.stderr):
        cfg = launch.load_config(config, work_dir=None, options=options, launcher="none")
        found, text = _preview(cfg, str(config), out, images, sample, seed)
    print(json.dumps(found, indent=1) if as_json else f"{text}\npicture: {out}")


def _preview(
    cfg: Any, name: str, out: Path, images: int, sample: int, seed: int
) -> tuple[dict[str, Any], str]:
    from ikd_fast.mmdet import census
    from ikd_fast.mmdet.explain import build_dataset, build_distiller
    from ikd_fast.mmdet.preview import branch_rows, choose_rows

    from mmengine.runner import set_random_seed

    set_random_seed(seed)
    model = build_distiller(cfg, name)
    model.set_total_steps(1)
    model.set_progress(0, 0)
    dataset = build_dataset(cfg, name)
    if len(dataset) == 0:
        raise launch.InputError(
            f"{name}: the training set has no images; check ann_file, data_prefix, metainfo's classes and filter_cfg of "
            "train_dataloader.dataset"
        )
    order = np.random.default_rng(seed).permutation(len(dataset)).tolist()
    counted = census.census(dataset, model.data_preprocessor.augment, order[:sample])
    rows, figures = [], []
    with _progress() as progress:
        task = progress.add_task("loading", total=None)
        chosen = choose_rows(model, dataset, order, images)
        progress.update(
            task, description="attacking" if model.ikd.adversarial else "drawing", total=len(chosen)
        )
        for row, facts in branch_rows(model, chosen):
            rows.append(row)
            figures.append(facts)
            progress.advance(task)
    draw_branches(out, rows, _title(model))
    return {"picture": str(out), "images": figures, "sample": counted}, census.render(counted, len(dataset))


def _title(model: Any) -> str:
    if not model.ikd.adversarial:
        return "What the student trains on (no adversarial branch)"
    attack = model.ikd.attack
    if not hasattr(attack, "eps"):
        return "What IKD trains on. Adversarial: images that were made before."
    return f"What IKD trains on. Adversarial: no pixel moves by more than {attack.eps:g} of 255 grey levels."


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
