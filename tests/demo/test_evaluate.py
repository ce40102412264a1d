"""AP of known detections: all right, all missed, half found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn, tensor, zeros

from ikd_fast.demo import configs
from ikd_fast.demo.coco import Split, find_split
from ikd_fast.demo.evaluate import evaluate, sizes_present

from mmengine.structures import InstanceData

BOXES = {1: [[10, 10, 20, 20], [50, 60, 40, 40]], 2: [[5, 5, 30, 50]]}  # xywh: one small, two of medium area


@pytest.fixture
def split(tmp_path: Path) -> Split:
    rows = [
        {"id": 10 * i + k, "image_id": i, "category_id": 1, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
        for i, boxes in BOXES.items()
        for k, b in enumerate(boxes)
    ]
    images = [{"id": i, "file_name": f"{i}.png", "width": 128, "height": 128} for i in BOXES]
    (tmp_path / "val").mkdir()
    for image in images:
        Image.fromarray(np.zeros((128, 128, 3), np.uint8)).save(tmp_path / "val" / image["file_name"])
    (tmp_path / "annotations").mkdir()
    coco = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "tree"}]}
    (tmp_path / "annotations/val.json").write_text(json.dumps(coco))
    return find_split(tmp_path, "val")


class Oracle(nn.Module):
    """A detector that finds exactly the given boxes."""

    def __init__(self, boxes: dict[int, list[list[int]]]) -> None:
        super().__init__()
        self.boxes = boxes

    def test_step(self, data):
        for sample in data["data_samples"]:
            boxes = (
                tensor([[x, y, x + w, y + h] for x, y, w, h in self.boxes.get(sample.img_id, [])])
                .float()
                .reshape(-1, 4)
            )
            n = len(boxes)
            sample.pred_instances = InstanceData(bboxes=boxes, scores=zeros(n) + 0.9, labels=zeros(n).long())
        return data["data_samples"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (BOXES, {"AP": 1.0, "AP50": 1.0, "AP_S": 1.0, "AP_M": 1.0, "AP_L": None}),
        ({}, {"AP": 0.0, "AP50": 0.0, "AP_S": 0.0, "AP_M": 0.0, "AP_L": None}),
        # Two of three found with full precision: 67 of COCO's 101 recall points are reached.
        ({1: BOXES[1]}, {"AP": 0.663, "AP50": 0.663, "AP_S": 1.0, "AP_M": 0.505, "AP_L": None}),
        # IoU 0.8 exactly: right at 7 of 10 thresholds.
        (
            {1: [[10, 10, 20, 16], [50, 60, 40, 32]], 2: [[5, 5, 30, 40]]},
            {"AP": 0.7, "AP50": 1.0, "AP_S": 0.7, "AP_M": 0.7, "AP_L": None},
        ),
    ],
)
def test_ap_by_hand(split: Split, tmp_path: Path, found, expected) -> None:
    cfg = configs.load("student.py", {"train": split, "val": split})
    assert evaluate(Oracle(found), cfg, tmp_path / "log", batch=1) == expected


def test_sizes_present_by_area() -> None:
    present = sizes_present({"annotations": [{"area": 32.0**2}, {"area": 1e5, "iscrowd": 1}]})
    # pycocotools counts an area of exactly 32^2 in both ranges
    assert present == {"AP": True, "AP50": True, "AP_S": True, "AP_M": True, "AP_L": False}
