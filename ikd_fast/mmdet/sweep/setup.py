"""The config of a sweep: read, pointed at data, checked before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ikd_fast.mmdet import launch
from ikd_fast.mmdet.build import resolve_path
from ikd_fast.mmdet.errors import InputError

from .length import Length, set_length


def load(config: str, options: Sequence[str], data: Path | None) -> Any:
    """``config``: a file, or one this package ships (``ikd_fast::demo/fgd_ikd.py``); ``data``: see :func:`point_at`."""
    path = Path(resolve_path(config, "configs"))
    if not path.is_file():
        raise InputError(f"no config {path} (relative to {Path.cwd()})", usage=True)
    cfg = launch.load_config(path, work_dir=None, options=list(options), launcher="none")
    if data is not None:
        point_at(cfg, data)
    return cfg


def point_at(cfg: Any, root: Path) -> None:
    """Training and validation on the COCO-format splits below ``root`` (the folders that ``ikd-fast demo --data`` takes)."""
    for split in ("train", "val"):
        layouts = (
            (f"annotations/{split}.json", f"{split}/"),
            (f"annotations/instances_{split}2017.json", f"{split}2017/"),
        )
        found = [(ann, prefix) for ann, prefix in layouts if (root / ann).is_file()]
        if not found:
            raise InputError(
                f"--data {root}: expected {' or '.join(str(root / ann) for ann, _ in layouts)}", usage=True
            )
        ann, prefix = found[0]
        classes = tuple(row["name"] for row in json.loads((root / ann).read_text())["categories"])
        dataset = cfg[f"{split}_dataloader"].dataset
        if str(dataset.get("type")) != "CocoDataset":
            raise InputError(
                f"--data needs {split}_dataloader.dataset of type CocoDataset, got {dataset.get('type')}",
                usage=True,
            )
        dataset.update(
            data_root=str(root), ann_file=ann, data_prefix=dict(img=prefix), metainfo=dict(classes=classes)
        )
    cfg.val_evaluator.ann_file = str(root / found[0][0])


def check(cfg: Any, name: str, length: Length) -> None:
    """What every run would stumble over.

    Raises:
        InputError: no evaluation in the config, a length its loop cannot have, annotation files that are not there.
    """
    missing = [key for key in ("val_cfg", "val_dataloader", "val_evaluator") if not cfg.get(key)]
    if missing:
        raise InputError(f"{name} has no {', '.join(missing)}: every run is evaluated with the config's own")
    set_length(cfg.copy(), length)
    for loader in ("train_dataloader", "val_dataloader"):
        dataset = cfg[loader].get("dataset") or {}
        if isinstance(dataset.get("ann_file"), str) and isinstance(dataset.get("data_root"), str):
            path = Path(dataset["data_root"]) / dataset["ann_file"]
            if "://" not in str(dataset["data_root"]) and not path.is_file():
                raise InputError(
                    f"{loader}.dataset: no annotation file {path}. Write --data FOLDER, or data_root in the config"
                    + ("; `ikd-fast demo --quick` makes the demo's data" if "demo" in name else "")
                )
