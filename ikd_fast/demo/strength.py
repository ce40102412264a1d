"""How strong the step's attacks are on the demo's teacher: class loss and AP50 on validation tiles. Imports mmdet.

``python -m ikd_fast.demo.strength runs/demo/data`` prints the table for the shipped teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ikd_fast.mmdet  # noqa: F401
from ikd_fast.analysis import StrengthRow, attack_strength, strength_table
from ikd_fast.attack import OnlineDIFGSM
from ikd_fast.demo import configs
from ikd_fast.demo.coco import find_splits
from ikd_fast.demo.evaluate import load_model
from ikd_fast.demo.quiet import quiet
from ikd_fast.demo.teacher import SHIPPED, read_teacher
from ikd_fast.distill import FrozenTeacher
from ikd_fast.mmdet.build import preprocessor_facts
from ikd_fast.mmdet.samples import image_key, to_targets
from ikd_fast.mmdet.victim import MMDetVictim

from mmdet.registry import DATASETS, METRICS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

ATTACKS = {
    "random sign": OnlineDIFGSM("random_sign"),
    "single": OnlineDIFGSM("single"),
    "iterative (5 x 2, DI)": OnlineDIFGSM("iterative"),
}
"""All at eps 8, with the settings a training step uses."""


class _Victim:
    def __init__(self, teacher: Any) -> None:
        self.teacher, self.cls_loss = teacher, MMDetVictim(FrozenTeacher(teacher))

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.teacher.extract_feat(images)


def teacher_strength(
    teacher: Any, cfg: Config, *, images: int | None = None, batch: int = 4
) -> list[StrengthRow]:
    """Clean, random-sign, ``single`` and ``iterative`` rows on ``cfg``'s test loader (or its first ``images``)."""
    teacher = teacher.eval().requires_grad_(False)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    count = len(dataset) if images is None else min(images, len(dataset))
    units, _, _ = preprocessor_facts(cfg.model)
    # Samples with their boxes: the test split of mmdet keeps them when its pipeline loads annotations.
    data = [
        teacher.data_preprocessor(pseudo_collate([dataset[i] for i in range(k, min(k + batch, count))]))
        for k in range(0, count, batch)
    ]

    def batches() -> Iterator[tuple[Tensor, Any, list[int]]]:
        for item in data:
            yield (
                item["inputs"],
                _in_network_pixels(item["data_samples"]),
                [image_key(s.metainfo) for s in item["data_samples"]],
            )

    def evaluate(perturbed: Iterable[Tensor]) -> dict[str, float]:
        metric = METRICS.build(dict(cfg.test_evaluator))
        metric.dataset_meta = dataset.metainfo
        for inputs, item in zip(perturbed, data, strict=True):
            with torch.no_grad():
                found = teacher.predict(inputs, [s.clone() for s in item["data_samples"]])
            metric.process({}, [sample.to_dict() for sample in found])
        return {"AP50": float(metric.evaluate(count).get("coco/bbox_mAP_50", 0.0))}

    return attack_strength(_Victim(teacher), batches, ATTACKS, units=units, evaluate=evaluate)


def _in_network_pixels(samples: list[Any]) -> list[dict[str, Any]]:
    """Targets with boxes as the net sees them: mmdet's test pipelines load annotations after the resize, unresized."""
    targets = to_targets(samples)
    for target in targets:
        sx, sy = target["scale"]
        target["boxes"] = target["boxes"] * target["boxes"].new_tensor([sx, sy, sx, sy])
    return targets


def main(root: Path, log: Path) -> None:
    """Print the table for the shipped teacher on the validation tiles below ``root``."""
    with quiet(log):
        cfg = configs.load("teacher.py", find_splits(root), evaluate="val")
        rows = teacher_strength(load_model(cfg, read_teacher(SHIPPED)), cfg)
    print(strength_table(rows))


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="data folder of a demo run, e.g. runs/demo/data")
    parser.add_argument(
        "--log", type=Path, default=Path("runs/strength.log"), help="where mmdet's own output goes"
    )
    given = parser.parse_args()
    given.log.parent.mkdir(parents=True, exist_ok=True)
    main(given.root, given.log)
