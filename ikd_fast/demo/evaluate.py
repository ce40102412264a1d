"""Box AP by the COCO protocol, with mmdet's own data set, model and metric. Imports mmdet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import ikd_fast.mmdet  # noqa: F401  (makes mmdet importable without compiled operators)
from ikd_fast.demo.quiet import quiet

from mmdet.registry import DATASETS, METRICS, MODELS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

NAMES = {
    "AP": "bbox_mAP",
    "AP50": "bbox_mAP_50",
    "AP_S": "bbox_mAP_s",
    "AP_M": "bbox_mAP_m",
    "AP_L": "bbox_mAP_l",
}
"""Ours to CocoMetric's: AP over IoU 0.50:0.95, at 0.50, and of boxes below 32^2, up to 96^2 and above (annotation pixels)."""
AREAS = {
    "AP": (0, 1e10),
    "AP50": (0, 1e10),
    "AP_S": (0, 32**2),
    "AP_M": (32**2, 96**2),
    "AP_L": (96**2, 1e10),
}
"""pycocotools' area ranges, ends included."""

Scores = dict[str, float | None]


def load_model(cfg: Config, weights: dict[str, torch.Tensor]) -> Any:
    """The detector of ``cfg`` in eval mode with exactly these weights; a missing or unexpected key raises."""
    model = MODELS.build(cfg.model)
    model.load_state_dict(weights)
    return model.eval()


def evaluate(model: Any, cfg: Config, log: Path, *, batch: int = 4) -> Scores:
    """AP of ``model`` on ``cfg``'s test loader, each in 0..1 to 3 digits; None where the split has no box of that size.

    A net that finds nothing has AP 0 (mmdet's metric says nothing then).
    """
    with quiet(log), torch.inference_mode():
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
        metric = METRICS.build(dict(cfg.test_evaluator))
        metric.dataset_meta = dataset.metainfo
        for start in range(0, len(dataset), batch):
            rows = [dataset[i] for i in range(start, min(start + batch, len(dataset)))]
            samples = model.test_step(pseudo_collate(rows))
            metric.process({}, [sample.to_dict() for sample in samples])
        found = metric.evaluate(len(dataset))
    present = sizes_present(json.loads(Path(cfg.test_evaluator.ann_file).read_text()))
    return {
        name: float(found.get(f"coco/{key}", 0.0)) if present[name] else None for name, key in NAMES.items()
    }


def sizes_present(coco: dict[str, Any]) -> dict[str, bool]:
    """Whether a COCO data set has boxes that each metric is about, by the areas that its annotations give."""
    areas = [row["area"] for row in coco["annotations"] if not row.get("iscrowd")]
    return {name: any(low <= area <= high for area in areas) for name, (low, high) in AREAS.items()}
