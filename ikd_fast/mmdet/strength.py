"""A detector, its test images and its metric, as a strength report asks for them."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ikd_fast.analysis.strength import StrengthBatch
from ikd_fast.attack import AttackBatch
from ikd_fast.distill import FrozenTeacher, Renormalize

from mmdet.registry import DATASETS, METRICS, MODELS
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from .attack_scope import overridden, without_child
from .build import build_teacher, num_classes, preprocessor_facts, resolve_path
from .classes import mismatch, names_of_data
from .errors import InputError
from .samples import image_key
from .settings import Branch, plain_model
from .victim import MMDetVictim, check_class_loss


class DetectorVictim:
    """Maps and class loss of an mmdet detector: what attacks differentiate and reports measure."""

    def __init__(self, teacher: FrozenTeacher, *, include_rpn: bool = False) -> None:
        self.net: Any = teacher.net
        self.loss = MMDetVictim(teacher, include_rpn=include_rpn)

    def features(self, images: Tensor) -> list[Tensor]:
        return list(self.net.extract_feat(images))

    def cls_loss(self, images: Tensor, targets: Any) -> Tensor:
        return self.loss(images, targets)

    def keyed_cls_loss(self, batch: AttackBatch) -> Tensor:
        return self.loss.keyed_cls_loss(batch)

    def maps_and_loss(self, batch: AttackBatch) -> tuple[list[Tensor], Tensor]:
        return self.loss.joint(batch, lambda: self.features(batch.images))


class DetectorSubject:
    """Implements :class:`~ikd_fast.analysis.strength.Subject` for a config's test set.

    Boxes are the annotations', times the resize of the test pipeline; detections are scored by the config's own metric, on these
    images alone.

    Args:
        teacher: frozen, weights loaded.
        model: the teacher's model config.
        dataset: built; ``evaluator``: its metric's config.
        indices: which of its images.
        batch: images a batch.
    """

    rgb: bool

    def __init__(
        self,
        teacher: FrozenTeacher,
        model: Mapping[str, Any],
        dataset: Any,
        evaluator: Mapping[str, Any],
        indices: Sequence[int],
        *,
        batch: int = 4,
        device: str = "cpu",
        include_rpn: bool = False,
    ) -> None:
        self.teacher, self.dataset, self.indices, self.batch = teacher, dataset, list(indices), batch
        self.model = dict(model)
        self.net: Any = teacher.to(device).net
        self.victim = DetectorVictim(teacher, include_rpn=include_rpn)
        self.units, turned, self.divisor = preprocessor_facts(model)
        # Loaders read BGR.
        self.rgb = turned
        plain = dict(type="DetDataPreprocessor", pad_size_divisor=self.divisor)
        self.preprocessor: Any = MODELS.build(dict(model.get("data_preprocessor") or plain)).to(device).eval()
        self.evaluator = dict(evaluator)
        self.batches_count = -(-len(self.indices) // batch)

    def batches(self) -> Iterator[StrengthBatch]:
        for start in range(0, len(self.indices), self.batch):
            places = self.indices[start : start + self.batch]
            data = self.preprocessor(pseudo_collate([self.dataset[i] for i in places]), False)
            samples, images = data["data_samples"], data["inputs"]
            targets = [
                _target(self.dataset.get_data_info(i), sample, images.device)
                for i, sample in zip(places, samples, strict=True)
            ]
            yield StrengthBatch(
                images=images,
                targets=targets,
                sizes=[target["size"] for target in targets],
                ids=[image_key(sample.metainfo) for sample in samples],
                originals=[_pair(sample.metainfo["ori_shape"]) for sample in samples],
                payload=samples,
            )

    @torch.no_grad()
    def look(self, images: Tensor, batch: StrengthBatch, maps: Sequence[Tensor]) -> tuple[Tensor, list[Any]]:
        roi_head = getattr(self.net, "roi_head", None)
        key = AttackBatch(images, batch.targets, batch.sizes, 0, lambda: images, batch.ids)
        with ExitStack() as stack:
            # Heads alone: the maps are there.
            stack.enter_context(overridden(self.net, extract_feat=lambda _: tuple(maps)))
            loss = self.victim.keyed_cls_loss(key)
            if isinstance(roi_head, torch.nn.Module):
                stack.enter_context(without_child(roi_head, "mask_head"))
            found = self.net.predict(images, [sample.clone() for sample in batch.payload])
        return loss, [sample.to_dict() for sample in found]

    def score(self, found: list[Any]) -> dict[str, float]:
        """AP50 and AP of the boxes, 0..1; a net that finds nothing has 0."""
        with redirect_stdout(io.StringIO()), _without_log():
            metric: Any = METRICS.build(dict(self.evaluator))
            metric.dataset_meta = self.dataset.metainfo
            if hasattr(metric, "img_ids"):
                # Else images that were left out count as images in which nothing was found.
                metric.img_ids = [sample["img_id"] for sample in found]
            metric.process({}, found)
            scores = metric.evaluate(len(found))
        return {name: _entry(scores, keys) for name, keys in AP_KEYS.items()}


AP_KEYS = {"AP50": ("bbox_mAP_50", "AP50"), "AP": ("bbox_mAP", "mAP")}
"""Ours to what mmdet's metrics call them, below their prefix."""


def _entry(scores: Mapping[str, Any], keys: Sequence[str]) -> float:
    for key in keys:
        for name, value in scores.items():
            if name.rpartition("/")[2] == key:
                return max(0.0, float(value))
    return 0.0


def _pair(shape: Sequence[Any]) -> tuple[int, int]:
    return int(shape[0]), int(shape[1])


def _target(info: Mapping[str, Any], sample: Any, device: torch.device) -> dict[str, Any]:
    """Boxes in network pixels from the annotations themselves: test pipelines load them before or after the resize, or not."""
    meta = sample.metainfo
    size, (sx, sy) = _pair(meta["img_shape"]), tuple(meta.get("scale_factor", (1.0, 1.0))[:2])
    height, width = meta["ori_shape"][:2]
    if meta.get("flip") or size[0] < int(height * sy) or size[1] < int(width * sx):
        raise InputError(
            f"{meta.get('img_path')}: the test pipeline flips or crops ({height}x{width} by {sy:g}, {sx:g} to {size[0]}x{size[1]}), and "
            "strength is measured on whole images: leave only loading, Resize and PackDetInputs in test_dataloader.dataset.pipeline"
        )
    scale = torch.tensor([sx, sy, sx, sy], device=device)
    rows = info.get("instances", [])

    def boxes(ignored: bool) -> Tensor:
        found = [row["bbox"] for row in rows if bool(row.get("ignore_flag")) == ignored]
        return torch.tensor(found, dtype=torch.float32, device=device).reshape(-1, 4) * scale

    labels = [row["bbox_label"] for row in rows if not row.get("ignore_flag")]
    return {
        "boxes": boxes(False),
        "labels": torch.tensor(labels, dtype=torch.long, device=device),
        "ignored": boxes(True),
        "size": size,
    }


class _without_log:
    """mmengine's metrics print whole tables, at each of a report's hundreds of evaluations."""

    def __enter__(self) -> None:
        self.logger = MMLogger.get_current_instance()
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)


def build_subject(
    cfg: Any, name: str, checkpoint: str, *, images: int, batch: int = 4, device: str = "cpu"
) -> DetectorSubject:
    """The teacher of ``cfg``, which is its own config or one that distils it, on ``images`` of the test set, evenly spaced.

    Raises:
        InputError, ValueError, FileNotFoundError: no test set, files that are not there, no images, no boxes, a checkpoint of another
            net, classes that the teacher lacks.
    """
    init_default_scope(cfg.get("default_scope") or "mmdet")
    model = teacher_model(cfg)
    units, _, _ = preprocessor_facts(model)
    teacher = build_teacher(model, checkpoint, Renormalize(units, units), None)
    dataset, evaluator = test_set(cfg, name)
    if len(dataset) == 0:
        raise InputError(
            f"{name}: the test set has no images; check ann_file, data_prefix, metainfo's classes and filter_cfg of "
            "test_dataloader.dataset"
        )
    check_classes(teacher, dataset, name)
    count = min(images, len(dataset))
    indices = [i * len(dataset) // count for i in range(count)]
    if not any(dataset.get_data_info(i).get("instances") for i in indices):
        raise InputError(
            f"{name}: none of the {count} test images has a box, and without any there is no class loss to raise; point "
            "test_dataloader.dataset at annotated images (validation, not test-dev)"
        )
    subject = DetectorSubject(
        teacher, model, dataset, evaluator, indices, batch=batch, device=device,
        include_rpn=bool(cfg.model.get("include_rpn", False)),
    )  # fmt: skip
    if not model.get("train_cfg"):
        check_class_loss(subject.victim.loss)
    return subject


def teacher_model(cfg: Any) -> dict[str, Any]:
    """The model that is attacked: of an IKD config its ``teacher_config``, of any other its ``model``."""
    model = cfg.get("model")
    if model is None:
        raise InputError(
            "the config has no model: give a detector's config, or one whose model is an IKDDistiller"
        )
    if distils(cfg):
        return plain_model("teacher_config", model.teacher_config)
    return plain_model("CONFIG", cfg)


def distils(cfg: Any) -> bool:
    """Whether this is an IKD config."""
    return str(cfg.model.get("type")).rpartition(".")[2] == "IKDDistiller"


def configured_attack(cfg: Any) -> dict[str, Any] | None:
    """What an IKD config says of its attack; None of a config without one."""
    if not distils(cfg) or cfg.model.get("adv") is None:
        return None
    attack = Branch.of(cfg.model.adv).attack
    if not isinstance(attack, Mapping):
        raise InputError(
            f"adv.attack must be dict(type='OnlineDIFGSM', ...) to be measured at other eps, got {attack!r:.200}"
        )
    found = {key: value for key, value in attack.items() if key not in ("type", "seed")}
    return {**found, "memory": dict(found["memory"])} if isinstance(found.get("memory"), Mapping) else found


def test_set(cfg: Any, name: str) -> tuple[Any, dict[str, Any]]:
    """The data set of ``test_dataloader`` (else ``val_dataloader``), built, and its metric of boxes."""
    loader, evaluator = (
        cfg.get(f"test_{what}") or cfg.get(f"val_{what}") for what in ("dataloader", "evaluator")
    )
    if not loader or not evaluator:
        raise InputError(
            f"{name} has no test_dataloader and test_evaluator (nor val_...): whose images shall be attacked?"
        )
    try:
        with redirect_stdout(io.StringIO()):  # pycocotools reports that it reads
            dataset = DATASETS.build(loader.dataset)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: the test data is not there: {error}; point test_dataloader.dataset and the metric at it, e.g. --cfg-options "
            "test_dataloader.dataset.data_root=FOLDER/ test_evaluator.ann_file=FOLDER/annotations/val.json"
        ) from error
    metric = dict(evaluator[0] if isinstance(evaluator, (list, tuple)) else evaluator)
    if "metric" in metric:
        metric["metric"] = "bbox" if "Coco" in str(metric.get("type")) else metric["metric"]
    if metric.get("ann_file") and not Path(metric["ann_file"]).is_file() and "://" not in metric["ann_file"]:
        raise FileNotFoundError(
            f"{name}: the metric's annotations are not there: {metric['ann_file']}; write --cfg-options test_evaluator.ann_file=FILE"
        )
    return dataset, metric


def check_classes(teacher: FrozenTeacher, dataset: Any, name: str, split: str = "test") -> None:
    """Raise where a label of the data set means nothing, or another class, to the teacher."""
    names = names_of_data(dataset)
    if not names:
        raise InputError(
            f"{name}: the {split} set names no classes, so nothing says what its labels mean; write metainfo=dict(classes=(...)) in "
            f"{split}_dataloader.dataset"
        )
    known = num_classes(teacher.net)
    for classes in names:
        if known is not None and known < len(classes):
            raise InputError(
                f"{name}: the {split} set has {len(classes)} classes, the teacher {known}; labels beyond its own have no class loss"
            )
        problem = (
            None
            if teacher.loaded is None or teacher.loaded.classes is None
            else mismatch(teacher.loaded.classes, classes)
        )
        if problem is not None:
            raise InputError(f"{name}: {problem}")


def fingerprint(subject: DetectorSubject, cfg: Any, checkpoint: str, settings: Mapping[str, Any]) -> str:
    """Hash of what a report's parts depend on: weights, configs, images, settings, and the code that attacks and measures."""
    digest = hashlib.sha256()
    digest.update(subject.teacher.fingerprint().encode())
    facts = {
        "model": teacher_model(cfg), "data": cfg.get("test_dataloader") or cfg.get("val_dataloader"), "metric": subject.evaluator,
        "images": subject.indices, "batch": subject.batch, "settings": dict(settings),
    }  # fmt: skip
    digest.update(json.dumps(facts, default=str, sort_keys=True).encode())
    package = Path(__file__).parents[1]
    for file in sorted([*package.glob("attack/**/*.py"), *package.glob("analysis/**/*.py"), Path(__file__)]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def checkpoint_path(checkpoint: str) -> str:
    """``ikd_fast::`` names as files; others must be there."""
    path = resolve_path(checkpoint, "assets")
    if "://" not in path and not Path(path).is_file():
        raise InputError(f"no checkpoint {path} (relative to {Path.cwd()})", usage=True)
    return path
