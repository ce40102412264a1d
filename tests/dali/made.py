"""A small COCO set of JPEGs and mmdet's configs on it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.dali.files import picture, save

IMAGES = 11
SIZES = [(40, 56), (56, 40), (33, 61), (48, 48)]


def size_of(i: int) -> tuple[int, int]:
    return SIZES[i % len(SIZES)]


def boxes_of(i: int) -> list[tuple[list[float], dict]]:
    """xywh and what else is said: even images have a large object, every third a crowd, every fifth nothing usable."""
    height, width = size_of(i)
    large = [([3.25, 2.5, width - 9.0, height - 6.5], {})] if i % 2 == 0 else []
    crowd = [([1.0, 1, 20, 12], dict(iscrowd=1))] if i % 3 == 0 else []
    return [*large, ([10.0, 8, 9.5, 7], {}), *crowd, ([2.0, 20, 0.5, 9], {})]


def write_set(
    root: Path, count: int = IMAGES, extension: str = "jpg", replace: dict[int, bytes | None] | None = None
) -> Path:
    """Images ``0..count-1`` and ``ann.json``; ``replace`` puts other bytes, or no file, in an image's place."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        height, width = size_of(i)
        data = save(picture(height, width, i), "JPEG" if extension == "jpg" else "PNG")
        data = (replace or {}).get(i, data)
        name = f"{i}.{extension}"
        if data is not None:
            (root / "images" / name).write_bytes(data)
        images.append(dict(id=i, file_name=name, width=width, height=height))
        for (x, y, w, h), more in boxes_of(i):
            annotations.append(
                dict(
                    id=len(annotations) + 1, image_id=i, category_id=1, bbox=[x, y, w, h], area=w * h,
                    iscrowd=0, segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
                ) | more
            )  # fmt: skip
    content = dict(images=images, annotations=annotations, categories=[dict(id=1, name="box")])
    (root / "ann.json").write_text(json.dumps(content))
    return root


def dataset(root: Path, transforms: list[dict], masks: bool = False, polygons: bool = False) -> dict:
    return dict(
        type="CocoDataset", data_root=str(root), ann_file="ann.json", data_prefix=dict(img="images/"),
        metainfo=dict(classes=("box",)), filter_cfg=dict(filter_empty_gt=True, min_size=1), serialize_data=False,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=masks, poly2mask=not polygons),
            *transforms,
            dict(type="PackDetInputs"),
        ],
    )  # fmt: skip
