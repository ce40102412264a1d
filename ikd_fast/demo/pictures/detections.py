"""What teacher and students find on validation images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.lines import Line2D
from PIL import Image

from ikd_fast.demo import configs
from ikd_fast.demo.coco import Split
from ikd_fast.demo.evaluate import load_model
from ikd_fast.demo.plan import STUDENTS, TITLES
from ikd_fast.demo.quiet import quiet
from ikd_fast.distill.teacher import read_weights
from ikd_fast.pictures.canvas import FOUND, MISSED, WRONG, draw_boxes, figure, save, show

from mmdet.registry import DATASETS
from mmengine.dataset import pseudo_collate

SCORE = 0.3
ROWS = 2


def draw_detections(path: Path, out: Path, splits: dict[str, Split]) -> Path:
    """Two validation images side by side: found, missed and wrong boxes of each model at score 0.3 and IoU 0.5."""
    split = splits["val"]
    chosen = busiest(json.loads((split.root / split.ann_file).read_text()), ROWS)
    models = {"teacher": out / "teacher.pth", **{name: out / f"student_{name}.pth" for name in STUDENTS}}
    fig = figure(3.1 * len(models), 3.3 * len(chosen) + 0.7)
    fig.suptitle(f"Validation images: detections with a score of at least {SCORE}", fontsize=10)
    axes = fig.subplots(len(chosen), len(models), squeeze=False)
    for column, (name, checkpoint) in enumerate(models.items()):
        cfg = configs.load("teacher.py" if name == "teacher" else "student.py", splits)
        with quiet(out / "work" / "pictures.log"), torch.inference_mode():
            model = load_model(cfg, read_weights(checkpoint))
            dataset = DATASETS.build(cfg.test_dataloader.dataset)
            places = {dataset.get_data_info(i)["img_id"]: i for i in range(len(dataset))}
            samples = model.test_step(pseudo_collate([dataset[places[image["id"]]] for image, _ in chosen]))
        for row, (sample, (image, truth)) in enumerate(zip(samples, chosen, strict=True)):
            found = sample.pred_instances[sample.pred_instances.scores >= SCORE]
            boxes = np.concatenate([found.bboxes.numpy(), found.labels.numpy()[:, None]], axis=1)
            hit, matched = match(boxes, found.scores.numpy(), truth)
            ax = axes[row, column]
            pixels = np.asarray(Image.open(split.root / split.prefix / image["file_name"]).convert("RGB"))
            show(ax, pixels, f"{TITLES[name]}\n{hit.sum()} of {len(truth)} found, {(~hit).sum()} wrong")
            draw_boxes(ax, truth[~matched, :4], MISSED, "--")
            draw_boxes(ax, boxes[hit, :4], FOUND, width=1.5)
            draw_boxes(ax, boxes[~hit, :4], WRONG, width=1.5)
    names = (
        ("found (right class, IoU 0.5 or more)", FOUND, "-"),
        ("wrong", WRONG, "-"),
        ("annotated, missed", MISSED, "--"),
    )
    lines = [Line2D([], [], color=colour, ls=style, label=label, lw=2) for label, colour, style in names]
    fig.legend(
        handles=lines,
        loc="outside lower center",
        ncols=3,
        fontsize=9,
        facecolor="#707070",
        labelcolor="white",
    )
    return save(fig, path)


def busiest(coco: dict, count: int) -> list[tuple[dict, np.ndarray]]:
    """The ``count`` images with the most boxes, ties by id: (image entry, ``[n,5]`` xyxy boxes and class indices)."""
    labels = {category["id"]: float(i) for i, category in enumerate(coco["categories"])}
    boxes: dict[int, list[list[float]]] = {image["id"]: [] for image in coco["images"]}
    for row in coco["annotations"]:
        if not row.get("iscrowd"):
            x, y, w, h = row["bbox"]
            boxes[row["image_id"]].append([x, y, x + w, y + h, labels[row["category_id"]]])
    order = sorted(coco["images"], key=lambda image: (-len(boxes[image["id"]]), image["id"]))
    return [(image, np.array(boxes[image["id"]]).reshape(-1, 5)) for image in order[:count]]


def match(
    boxes: np.ndarray, scores: np.ndarray, truth: np.ndarray, threshold: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy matching by falling score, each annotated box once: (detection is right ``[n]``, annotation is found ``[m]``).

    Boxes are xyxy; columns after the fourth, such as the class, must be equal in both.

    >>> hit, found = match(np.array([[0.0, 0, 10, 10]]), np.array([0.9]), np.array([[0.0, 0, 10, 8], [50, 50, 60, 60]]))
    >>> hit.tolist(), found.tolist()
    ([True], [True, False])
    """
    hit, found = np.zeros(len(boxes), bool), np.zeros(len(truth), bool)
    for i in np.argsort(-scores, kind="stable"):
        low, high = np.maximum(truth[:, :2], boxes[i, :2]), np.minimum(truth[:, 2:4], boxes[i, 2:4])
        shared = (high - low).clip(0).prod(1)
        union = (truth[:, 2:4] - truth[:, :2]).prod(1) + (boxes[i, 2:4] - boxes[i, :2]).prod() - shared
        iou = np.where(found | (truth[:, 4:] != boxes[i, 4:]).any(1), 0.0, shared / np.maximum(union, 1e-9))
        if len(truth) and iou.max() >= threshold:
            hit[i] = found[iou.argmax()] = True
    return hit, found
