"""A data set small enough to train on in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIDE = 64


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten training and three validation images: bright squares of two classes on noise."""
    root = tmp_path_factory.mktemp("tiny_coco")
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir()
    for split, count in (("train", 10), ("val", 3)):
        images, rows = [], []
        (root / split).mkdir()
        for i in range(1, count + 1):
            pixels = rng.integers(0, 80, (SIDE, SIDE, 3), dtype=np.uint8)
            for k in range(2):
                side = int(rng.integers(12, 40))
                x, y = (int(v) for v in rng.integers(0, SIDE - side, 2))
                pixels[y : y + side, x : x + side, k] = 250
                box = {"bbox": [x, y, side, side], "area": side * side, "iscrowd": 0, "category_id": k + 1}
                rows.append({"id": len(rows) + 1, "image_id": i, **box})
            images.append({"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE})
            Image.fromarray(pixels).save(root / split / f"{i}.png")
        categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}]
        coco = {"images": images, "annotations": rows, "categories": categories}
        (root / f"annotations/{split}.json").write_text(json.dumps(coco))
    return root
