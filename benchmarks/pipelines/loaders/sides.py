"""The same dict of a loader, read by mmdet's ``DataLoader`` and by DALI."""

from __future__ import annotations

import copy
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

import ikd_fast.mmdet  # noqa: F401  (makes mmdet importable without compiled operators)

from mmengine.registry import init_default_scope
from mmengine.runner import Runner

TICK = os.sysconf("SC_CLK_TCK")
COCO = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
DEMO = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="KeyedRandomCrop", size=256, scale=(0.75, 1.4), brightness=0.2, seed=0),
    dict(type="PackDetInputs"),
]


def config(root: Path, pipeline: list[dict], batch: int) -> dict[str, Any]:
    """The loader's dict, without what the sides differ in."""
    return dict(
        batch_size=batch,
        drop_last=False,
        sampler=dict(type="KeyedSampler", seed=0),
        dataset=dict(
            type="CocoDataset",
            data_root=str(root),
            ann_file="annotations/train.json",
            data_prefix=dict(img="train/"),
            metainfo=dict(classes=("tree",)),
            pipeline=pipeline,
        ),
    )


@dataclass
class Pass:
    """Of one pass over a data set: wall-clock and CPU seconds, this process and its workers, and the images."""

    seconds: float
    cpu_seconds: float
    images: int


class Side:
    """A loader that is read pass after pass.

    Args:
        loader: mmengine's dict.
        workers: processes of mmdet's loader; threads of DALI.
        dali: settings of ``DALIDetLoader``, whose host part runs in this process; None for mmdet's loader.
    """

    def __init__(self, loader: dict[str, Any], workers: int, dali: dict[str, Any] | None) -> None:
        init_default_scope("mmdet")
        # As mmdet's configs have it: workers are the only threads.
        cv2.setNumThreads(0)
        cfg = copy.deepcopy(loader)
        if dali is not None:
            cfg.update(type="DALIDetLoader", threads=workers, **dali)
        else:
            cfg.update(num_workers=workers, persistent_workers=workers > 0)
        self.loader = Runner.build_dataloader(cfg)
        self.epoch = 0

    def read(self) -> Pass:
        """One pass, nothing done with the batches."""
        self.loader.batch_sampler.sampler.set_epoch(self.epoch)
        self.epoch += 1
        cpu, images, start = self._cpu(), 0, time.perf_counter()
        for batch in self.loader:
            images += len(batch["inputs"])
        return Pass(time.perf_counter() - start, self._cpu() - cpu, images)

    def _cpu(self) -> float:
        own = resource.getrusage(resource.RUSAGE_SELF)
        workers = getattr(getattr(self.loader, "_iterator", None), "_workers", [])
        return own.ru_utime + own.ru_stime + sum(_of_process(worker.pid) for worker in workers)


def _of_process(pid: int) -> float:
    # The name may hold blanks; what follows it does not.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK
