"""A data set like the demo's, made up: smooth PNG tiles of 384 pixels with small boxes, in COCO's format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

TILE, BOXES = 384, 20
# Below the augmentation's threshold, so that it adds noise and never crops: then every side sees frames of one size.
BOX_SIDES = (14.0, 26.0)


def write_tiles(root: Path, count: int, *, noise: float = 0.0) -> Path:
    """``count`` tiles as splits ``train`` and ``val`` below ``root``; ``noise``: +- so many grey levels at random signs on them."""
    rng = np.random.default_rng(0)
    signs = np.random.default_rng(1)
    folder = root / "train"
    folder.mkdir(parents=True)
    (root / "annotations").mkdir()
    images, boxes = [], []
    for i in range(count):
        name = f"tile_{i:02d}.png"
        pixels = _photograph(rng)
        pixels = pixels + noise * signs.choice((-1.0, 1.0), pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name, "PNG", compress_level=2)
        images.append({"id": i + 1, "file_name": name, "width": TILE, "height": TILE})
        for _ in range(BOXES):
            w, h = rng.uniform(*BOX_SIDES, 2)
            x, y = rng.uniform(0, TILE - w), rng.uniform(0, TILE - h)
            box = [round(float(v), 2) for v in (x, y, w, h)]
            boxes.append(
                {"id": len(boxes) + 1, "image_id": i + 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0, "category_id": 1}
            )  # fmt: skip
    coco = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "tree"}]}
    for split in ("train", "val"):
        (root / "annotations" / f"{split}.json").write_text(json.dumps(coco))
    (root / "val").symlink_to(folder, target_is_directory=True)
    return root


def _photograph(rng: np.random.Generator) -> np.ndarray:
    """``[TILE, TILE, 3]``: noise at several scales, so that it compresses about as a photograph does."""
    out = np.full((TILE, TILE, 3), 110.0)
    for cells, strength in ((6, 40.0), (24, 25.0), (96, 15.0), (TILE, 6.0)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        fine = np.asarray(coarse.resize((TILE, TILE), Image.Resampling.BICUBIC), dtype=np.float64)
        out += strength * (fine / 127.5 - 1)
    return out
