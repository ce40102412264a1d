"""What is loaded: JPEGs cut from the demo's aerial photographs at COCO's usual size, and the demo's own PNG tiles."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np

from ikd_fast.demo.data import TRAIN_IMAGES, read_voc
from ikd_fast.demo.fetch import read_source
from ikd_fast.demo.tiles import Rect, clip_boxes

WIDTH, HEIGHT, QUALITY = 640, 480, 90


def jpeg_set(root: Path, images: int, seed: int = 0) -> Path:
    """``root/train/*.jpg`` (4:2:0, quality 90) and ``root/annotations/train.json``, unless they are there."""
    from PIL import Image

    annotations = root / "annotations" / "train.json"
    if annotations.is_file() and len(json.loads(annotations.read_text())["images"]) == images:
        return root
    files = read_source()
    photos = {n: Image.open(io.BytesIO(files[f"{n}.png"])).convert("RGB") for n in TRAIN_IMAGES}
    boxes = {n: read_voc(files[f"{n}.xml"]) for n in TRAIN_IMAGES}
    (root / "train").mkdir(parents=True, exist_ok=True)
    annotations.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    # By area, so that no place is cut much more often than another.
    areas = np.array([p.width * p.height for p in photos.values()], dtype=float)
    entries, found = [], []
    for i in range(images):
        name = TRAIN_IMAGES[rng.choice(len(areas), p=areas / areas.sum())]
        x = int(rng.integers(0, photos[name].width - WIDTH + 1))
        y = int(rng.integers(0, photos[name].height - HEIGHT + 1))
        tile = Rect(x, y, x + WIDTH, y + HEIGHT)
        photos[name].crop(tile).save(root / "train" / f"{i:05d}.jpg", "JPEG", quality=QUALITY)
        entries.append({"id": i + 1, "file_name": f"{i:05d}.jpg", "width": WIDTH, "height": HEIGHT})
        for x1, y1, x2, y2 in clip_boxes(boxes[name], tile)[0].tolist():
            w, h = x2 - x1, y2 - y1
            box = {"bbox": [x1, y1, w, h], "area": w * h, "iscrowd": 0, "category_id": 1}
            found.append({"id": len(found) + 1, "image_id": i + 1, **box})
    content = {
        "images": entries,
        "annotations": found,
        "categories": [{"id": 1, "name": "tree"}],
    }
    annotations.write_text(json.dumps(content))
    return root
