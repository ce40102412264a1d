"""The demo's pair: mmdet's RetinaNets of ``configs/demo``, the shipped teacher, its loader, preprocessor and optimizer."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import ikd_fast.mmdet  # noqa: F401  (makes mmdet importable without compiled operators)
from ikd_fast.demo import configs
from ikd_fast.demo.coco import find_splits
from ikd_fast.demo.quiet import quiet
from ikd_fast.distill import StepBatch
from ikd_fast.mmdet.attack_scope import overridden
from ikd_fast.mmdet.samples import image_key, to_targets
from ikd_fast.mmdet.victim import MMDetVictim

from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.runner import set_random_seed

from .modes import PLAIN, Mode
from .prediction import Nets
from .sides import PublishedFGD, StoredImages, watch
from .tiles import write_tiles
from .timeline import Timeline


class DemoPair:
    """RetinaNet-R18 under RetinaNet-R18 of twice its width, 256-pixel crops; the images are made up, their cost is not."""

    name = "demo"

    def __init__(self, images: int = 8) -> None:
        self.images = images
        self.title = f"the demo's pair (mmdet RetinaNet-R18, teacher of twice the student's width), {images} images 256x256"
        self._folder = tempfile.TemporaryDirectory(prefix="ikd_fast_cost_")
        root = Path(self._folder.name)
        self.log = root / "console.log"
        self.splits = find_splits(write_tiles(root / "clean", images), optional=())
        self.stored = find_splits(write_tiles(root / "stored", images, noise=8.0), optional=())

    def config(self, mode: Mode) -> Config:
        """The demo's own config of this mode, without what ends (``stop_at``) or only begins (``calibrate``)."""
        name = "student.py" if mode.kd is None else "fgd_ikd.py" if mode.adversarial else "fgd.py"
        cfg = configs.load(name, self.splits)
        if mode.kd == "published":
            cfg.model.losses = [dict(type=PublishedFGD, preset="retinanet")]
        if mode.kd is not None:
            cfg.model.calibrate = 0
        if mode.adversarial:
            cfg.model.stop_at = None
            cfg.model.adv.attack = dict(type="OnlineDIFGSM", **(mode.attack or dict(mode="single")))
        configs.set_seed(cfg, 0)
        return cfg

    def side(self, mode: Mode, timeline: Timeline) -> DemoSide:
        with quiet(self.log):
            return DemoSide(self, mode, timeline)

    def dataset(self, splits: Mapping[str, Any]) -> Any:
        with quiet(self.log):
            return DATASETS.build(configs.load("fgd_ikd.py", dict(splits)).train_dataloader.dataset)

    def nets(self) -> Nets:
        side = self.side(Mode(PLAIN), Timeline())
        data = side.model.data_preprocessor(side.load(0)[0], True)
        images, samples, ikd = data["inputs"], data["data_samples"], side.ikd
        targets, keys = to_targets(samples), [image_key(s.metainfo) for s in samples]
        batch = StepBatch(images, images, targets, [t["size"] for t in targets], keys, 0, 0)
        victim, student, (loss,) = MMDetVictim(ikd.teacher), ikd.student, ikd.losses

        def task(x: Tensor) -> tuple[Tensor, Any]:
            maps = student.extract_feat(x)
            with overridden(student, extract_feat=lambda _: maps):
                value, _ = side.model.parse_losses(student.loss(x, samples))
            return value, maps

        def distill(s: Any, t: Any) -> Tensor:
            return torch.stack(list(loss(s, t, batch.context(0)).values())).sum()

        return Nets(
            images, ikd.teacher.net.extract_feat, lambda x: victim(x, targets), task, student.extract_feat, distill
        )  # fmt: skip

    def generation_seconds(self, repeats: int = 3) -> list[float]:
        """Seconds an image of the paper's offline pass: 5 steps of the attack on whole tiles, and each written as a PNG.

        The victim and the attack are the step's own; it is the code that makes the images offline that would differ.
        """
        side = self.side(Mode("offline pass", attack={"mode": "iterative"}, kind="iterative"), Timeline())
        dataset = self.dataset(self.splits)
        keep = [t for t in dataset.pipeline.transforms if type(t).__name__ != "KeyedRandomCrop"]
        dataset.pipeline.transforms = keep
        preprocessor = side.model.data_preprocessor
        preprocessor.augment = None
        spent = []
        for k in range(repeats + 1):
            start = time.perf_counter()
            data = preprocessor(pseudo_collate([dataset[i] for i in range(self.images)]), True)
            targets = to_targets(data["data_samples"])
            keys = data["image_keys"]
            batch = StepBatch(
                data["geo"], data["geo"], targets, [t["size"] for t in targets], keys, k, 0,
            )  # fmt: skip
            out = side.ikd.craft(batch).images
            pixels = side.ikd.units.to_pixels(out).round().clamp(0, 255).to(torch.uint8)
            for image in pixels:
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(io.BytesIO(), "PNG", compress_level=2)
            spent.append((time.perf_counter() - start) / self.images)
        return spent[1:]


class DemoSide:
    """A student of the demo in one mode: exactly what mmengine's loop runs, ``train_step`` on a batch of the loader."""

    def __init__(self, pair: DemoPair, mode: Mode, timeline: Timeline) -> None:
        self.pair, self.mode, self.timeline = pair, mode, timeline
        cfg = pair.config(mode)
        set_random_seed(0)
        self.model: Any = MODELS.build(cfg.model)
        self.model.init_weights()
        self.model.train()
        self.datasets = [
            pair.dataset(s) for s in ([pair.splits, pair.stored] if mode.offline else [pair.splits])
        ]
        self.ikd: Any = getattr(self.model, "ikd", None)
        self.attack: Any = None
        self.plain: Any = None
        if mode.offline:
            self.ikd.attack = StoredImages()
            # The second input is cropped as the first, and gets no noise.
            self.plain = MODELS.build(
                dict(
                    cfg.model.student.data_preprocessor, type="IKDDetDataPreprocessor", return_geo=True,
                    augment=dict(cfg.model.augment, noise_prob=0.0),
                )
            )  # fmt: skip
        if self.ikd is not None:
            self.attack = self.ikd.attack
            watch(self.ikd, timeline)
        for preprocessor in (self.model.data_preprocessor, self.plain):
            if preprocessor is not None:
                preprocessor.forward = timeline.wrapped("augmentation", preprocessor.forward)
        self.optimizer = build_optim_wrapper(self.model, cfg.optim_wrapper)

    def load(self, epoch: int) -> list[dict[str, Any]]:
        batches = []
        with self.timeline.within("data"):
            for dataset in self.datasets:
                for transform in dataset.pipeline.transforms:
                    if hasattr(transform, "set_epoch"):
                        transform.set_epoch(epoch)
                batches.append(pseudo_collate([dataset[i] for i in range(self.pair.images)]))
        return batches

    def step(self, batch: list[dict[str, Any]], epoch: int) -> Mapping[str, Tensor]:
        if self.ikd is not None:
            self.model.set_progress(epoch, epoch)
        if self.mode.offline:
            self.plain.set_progress(epoch, epoch)
            self.attack.given = self.plain(batch[1], True)["geo"]
        if self.mode.forget:
            self.attack.memory.close()
        with self.timeline.within("student"):
            return self.model.train_step(batch[0], self.optimizer)
