"""The demo's mmdet configs, pointed at a data set, a seed and a length. Imports mmdet."""

from __future__ import annotations

import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from ikd_fast.demo.coco import Split
from ikd_fast.demo.loader import set_loader
from ikd_fast.demo.plan import Epochs
from ikd_fast.demo.sampler import ChunkSampler
from ikd_fast.mmdet.history import last_checkpoint

from mmengine.config import Config
from mmengine.registry import init_default_scope


def demo_folder() -> Path:
    """Where the packaged ``configs/demo`` lies."""
    return Path(str(files("ikd_fast.configs"))) / "demo"


def load(name: str, splits: dict[str, Split], *, evaluate: str = "val") -> Config:
    """``configs/demo/NAME`` on the given data, its test loader on split ``evaluate``."""
    init_default_scope("mmdet")
    cfg = Config.fromfile(demo_folder() / name)
    for loader, split in (("train", "train"), ("val", "val"), ("test", evaluate)):
        _point(cfg[f"{loader}_dataloader"].dataset, splits[split])
        if loader != "train":
            cfg[f"{loader}_evaluator"].ann_file = str(splits[split].root / splits[split].ann_file)
    batch = min(cfg.train_dataloader.batch_size, splits["train"].images)
    cfg.train_dataloader.batch_size = batch
    model = cfg.model.get("student", cfg.model)
    model.bbox_head.num_classes = len(splits["train"].classes)
    return cfg


def _point(dataset: Any, split: Split) -> None:
    dataset.data_root = str(split.root)
    dataset.ann_file = split.ann_file
    dataset.data_prefix = dict(img=split.prefix)
    dataset.metainfo = dict(classes=split.classes)


def set_run(
    cfg: Config, work_dir: Path, epochs: Epochs, *, seed: int, init: Path | None, loader: str = "torch"
) -> None:
    """Length, seed, loader and folder of a training run; it resumes where ``work_dir`` has a checkpoint, else starts from ``init``.

    No evaluation inside the loop: it is done once, on the finished checkpoint.
    """
    cfg.work_dir = str(work_dir)
    # Runners of one process share loggers and message hubs by this name.
    cfg.experiment_name = f"{work_dir.name}_{time.time_ns()}"
    cfg.train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=epochs.count, val_interval=epochs.count + 1)
    # The shapes of the schedule, at any length: a fifth of it warms up, at least one epoch if there are two.
    warmup = min(max(1, epochs.count // 5), epochs.count - 1)
    rise, fall = cfg.param_scheduler
    rise.end = fall.begin = warmup
    fall.end = epochs.count
    cfg.param_scheduler = [rise, fall] if warmup else [fall]
    cfg.train_dataloader.sampler = dict(
        type=ChunkSampler.__name__, chunk=epochs.length * cfg.train_dataloader.batch_size
    )
    set_loader(cfg, loader)
    set_seed(cfg, seed)
    # A checkpoint costs as much as a step or two: about ten a run, always one at the end.
    cfg.default_hooks.checkpoint.interval = max(1, epochs.count // 10)
    last = last_checkpoint(work_dir)
    cfg.resume = last is not None
    cfg.load_from = str(last or init) if last or init else None
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None


def set_seed(cfg: Config, seed: int) -> None:
    """One seed for everything random: torch, the order of images, the loader's crops, the distiller's keyed draws."""
    cfg.randomness = dict(seed=seed)
    if cfg.model.type == "IKDDistiller":
        cfg.model.seed = seed
        if cfg.model.get("augment"):
            cfg.model.augment.seed = seed
        if cfg.model.get("adv"):
            cfg.model.adv.attack.seed = seed
    for transform in cfg.train_dataloader.dataset.pipeline:
        if transform.type == "KeyedRandomCrop":
            transform.seed = seed
