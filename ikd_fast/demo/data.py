"""Write the demo's data set: COCO JSON and PNG tiles, no pixel in two splits.

- train: the left 75 % of the two Yellowstone images, in overlapping tiles of 384 pixels;
- val: whole tiles of 256 pixels of the right 25 %, not overlapping;
- test: the two images of other sites (OSBS in Florida, SOAP in California), whole.
"""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ikd_fast.demo.errors import DemoError
from ikd_fast.demo.fetch import PACKAGE, read_source
from ikd_fast.demo.tiles import MIN_KEPT, Rect, clip_boxes, covering_tiles, disjoint_tiles, split_columns
from ikd_fast.files import write_bytes, write_json

TRAIN_IMAGES = ("2019_YELL_2_528000_4978000_image_crop2", "2019_YELL_2_541000_4977000_image_crop")
TEST_IMAGES = ("OSBS_029", "SOAP_061")
TRAIN_TILE, TRAIN_STRIDE, VAL_TILE = 384, 256, 256
ASSETS = Path(__file__).resolve().parent.parent / "assets"
MARKER = ".ikd-fast-demo"
"""Written into a data folder before anything else: what lies beside it is the demo's own and may be written again."""

SPLITS = ("train", "val", "test")
VERSION = 1
"""Raised whenever the tiles change, so that an older data folder is written again."""

README = f"""# Tree crowns from the air: the data of ikd_fast's demo

Cut by `ikd-fast demo` from the images that the Python package deepforest carries ({PACKAGE}, folder
deepforest/data; MIT licence, copyright 2019 Ben Weinstein, text in LICENSE.deepforest). The photographs are RGB
orthophotos of the National Ecological Observatory Network (NEON), Airborne Observation Platform, about 0.1 m a
pixel; the boxes are the deepforest authors' hand annotations, of one class here ("tree").

- train: left 75 % of the two Yellowstone images, overlapping {TRAIN_TILE}-pixel tiles
- val: right 25 % of the same images, {VAL_TILE}-pixel tiles without overlap; no pixel is in train
- test: OSBS_029 (Florida) and SOAP_061 (California), whole

A box cut by a tile border is clipped, and dropped if less than {MIN_KEPT:.0%} of its area remains.
Every image entry names its `source` and the `rect` (x1, y1, x2, y2) it was cut from.
"""


@dataclass(frozen=True)
class Tile:
    """One image to write: ``rect`` of photograph ``source`` in ``split``."""

    split: str
    source: str
    rect: Rect

    @property
    def file_name(self) -> str:
        short = self.source.removeprefix("2019_").removesuffix("2").removesuffix("_image_crop")
        return f"{short}_x{self.rect.x1:04d}_y{self.rect.y1:04d}.png"


def layout(sizes: dict[str, tuple[int, int]]) -> list[Tile]:
    """The tiles of every split, given each photograph's (width, height)."""
    tiles: list[Tile] = []
    for name in TRAIN_IMAGES:
        left, right = split_columns(*sizes[name])
        tiles += [Tile("train", name, r) for r in covering_tiles(left, TRAIN_TILE, TRAIN_STRIDE)]
        tiles += [Tile("val", name, r) for r in disjoint_tiles(right, VAL_TILE)]
    tiles += [Tile("test", name, Rect(0, 0, *sizes[name])) for name in TEST_IMAGES]
    return tiles


def read_voc(text: bytes) -> np.ndarray:
    """Boxes ``[n,4]`` (xyxy, as written) of a Pascal VOC annotation."""
    keys = ("xmin", "ymin", "xmax", "ymax")
    rows = [
        [float(node.findtext(f"bndbox/{key}", "nan")) for key in keys]
        for node in ET.fromstring(text).iter("object")
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def prepare(root: Path, *, wheel: Path | None = None, source: Path | None = None) -> Path:
    """Write the data set below ``root`` unless it is there already, and return ``root``.

    The annotation files are written last and whole, so an interrupted call is simply repeated. Nothing is ever deleted.

    Raises:
        DemoError: the photographs cannot be had (see :func:`ikd_fast.demo.fetch.read_source`), or ``root`` holds files
            under the demo's names that the demo did not write.
    """
    done = root / "annotations" / "done.json"
    version = _version(done)
    if version == VERSION:
        return root
    if version is None and not (root / MARKER).is_file():
        _refuse_foreign(root)
    files = read_source(wheel=wheel, source=source)
    names = (*TRAIN_IMAGES, *TEST_IMAGES)
    photos = {name: np.asarray(Image.open(io.BytesIO(files[f"{name}.png"])).convert("RGB")) for name in names}
    boxes = {name: read_voc(files[f"{name}.xml"]) for name in names}
    tiles = layout({name: (p.shape[1], p.shape[0]) for name, p in photos.items()})
    write_bytes(root / MARKER, b"The data of `ikd-fast demo`; it may be written again.\n")
    for split in SPLITS:
        chosen = [tile for tile in tiles if tile.split == split]
        for tile in chosen:
            r = tile.rect
            buffer = io.BytesIO()
            Image.fromarray(photos[tile.source][r.y1 : r.y2, r.x1 : r.x2]).save(
                buffer, "PNG", compress_level=2
            )
            write_bytes(root / split / tile.file_name, buffer.getvalue())
        write_json(root / "annotations" / f"{split}.json", coco_json(chosen, boxes))
    write_bytes(root / "README.md", README.encode())
    write_bytes(root / "LICENSE.deepforest", (ASSETS / "LICENSE.deepforest").read_bytes())
    write_json(done, {"version": VERSION, "source": PACKAGE})
    return root


def _version(done: Path) -> int | None:
    """The version of a finished data folder of ours; None where there is none."""
    try:
        facts = json.loads(done.read_text())
    except (OSError, ValueError):
        return None
    ours = isinstance(facts, dict) and str(facts.get("source", "")).startswith("deepforest")
    return facts.get("version") if ours else None


def _refuse_foreign(root: Path) -> None:
    names = (*SPLITS, "annotations", "README.md", "LICENSE.deepforest")
    found = [root / name for name in names if (root / name).exists() or (root / name).is_symlink()]
    foreign = [f"{path}{'/' if path.is_dir() else ''}" for path in found if not _is_empty_folder(path)]
    if foreign:
        raise DemoError(
            f"the demo writes its data below {root}, where {', '.join(foreign)} "
            f"{'is' if len(foreign) == 1 else 'are'} already and not the demo's (no {MARKER} beside).\n"
            "Nothing was changed. Write another --out FOLDER, or move those away; to use a data set of yours, write --data FOLDER.",
            usage=True,
        )


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def coco_json(tiles: list[Tile], boxes: dict[str, np.ndarray]) -> dict:
    """The COCO annotation of ``tiles``: one image entry a tile (ids from 1), clipped boxes as ``[x,y,w,h]``."""
    images, annotations = [], []
    ids: Iterator[int] = iter(range(1, 1 << 30))
    for image_id, tile in enumerate(tiles, start=1):
        r = tile.rect
        entry = {"id": image_id, "file_name": tile.file_name, "width": r.width, "height": r.height}
        images.append({**entry, "source": tile.source, "rect": list(r)})
        for x1, y1, x2, y2 in clip_boxes(boxes[tile.source], r)[0].tolist():
            w, h = x2 - x1, y2 - y1
            box = {"bbox": [x1, y1, w, h], "area": w * h, "iscrowd": 0, "category_id": 1}
            annotations.append({"id": next(ids), "image_id": image_id, **box})
    info = {"description": "Tree crowns from the air (ikd_fast demo)", "source": PACKAGE, "licence": "MIT"}
    categories = [{"id": 1, "name": "tree"}]
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}
