"""Find the splits of a COCO-format data set and check them before anything is trained."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from ikd_fast.demo.errors import DemoError

_ORIENTATION = 0x0112  # the EXIF tag
LAYOUTS = (("annotations/{}.json", "{}"), ("annotations/instances_{}2017.json", "{}2017"))
"""(annotation file, image folder) below the root, with the split's name for ``{}``."""


OPENED = 2000
"""The headers of so many image files a split are read before anything is trained."""


@dataclass(frozen=True)
class Split:
    """One checked split. ``classes`` are in the order of the file, which is the order of mmdet's labels.

    ``opened``: how many of its image files were compared with their entries, the first ones.
    """

    name: str
    root: Path
    ann_file: str
    prefix: str
    classes: tuple[str, ...]
    images: int
    boxes: int
    opened: int = 0


def find_split(root: Path, name: str) -> Split:
    """Find and check split ``name`` ("train", "val", "test") below ``root``.

    Raises:
        DemoError: no such folder or annotation file, or a file that is not COCO; the message names the file and the entry.
    """
    if not root.is_dir():
        raise DemoError(f"--data {root}: no such folder", usage=True)
    for ann_file, prefix in ((a.format(name), p.format(name)) for a, p in LAYOUTS):
        if (root / ann_file).is_file():
            return _check(name, root, ann_file, prefix)
    wanted = " or ".join(
        f"{root / a.format(name)} with images in {root / p.format(name)}/" for a, p in LAYOUTS
    )
    raise DemoError(f"annotation file missing: expected {wanted}", usage=True)


def find_splits(
    root: Path, names: Iterable[str] = ("train", "val"), optional: Iterable[str] = ("test",)
) -> dict[str, Split]:
    """The splits by name, all with the same classes in the same order; those in ``optional`` only where they exist."""
    splits = {name: find_split(root, name) for name in names}
    for name in optional:
        if any((root / ann.format(name)).is_file() for ann, _ in LAYOUTS):
            splits[name] = find_split(root, name)
    first = next(iter(splits.values()))
    for split in splits.values():
        if split.classes != first.classes:
            raise DemoError(
                f"{root / split.ann_file}: expected the categories of {first.ann_file} in their order, "
                f"{list(first.classes)}, found {list(split.classes)}"
            )
    return splits


def _check(name: str, root: Path, ann_file: str, prefix: str) -> Split:
    path = root / ann_file
    data = _read(path)
    images, annotations, categories = data["images"], data["annotations"], data["categories"]
    for key, rows in (("categories", categories), ("images", images), ("annotations", annotations)):
        if not rows:
            raise DemoError(f'{path}: no {key} ("{key}" is an empty list), at least one is needed')
    classes = tuple(_field(path, "categories", i, row, "name", str) for i, row in enumerate(categories))
    known = {_field(path, "categories", i, row, "id", int) for i, row in enumerate(categories)}
    if len(set(classes)) != len(classes) or len(known) != len(classes):
        raise DemoError(f"{path}: category names and ids must be unique, found names {list(classes)}")
    ids = set()
    for i, row in enumerate(images):
        ids.add(_field(path, "images", i, row, "id", int))
        _check_image(path, i, row, root / prefix)
    if len(ids) != len(images):
        raise DemoError(f"{path}: image ids must be unique, {len(images)} images have {len(ids)} ids")
    for i, row in enumerate(annotations):
        _check_annotation(path, i, row, ids, known)
    _check_usable(path, images, annotations)
    for i, row in enumerate(images[:OPENED]):
        _check_file(path, i, row, root / prefix / row["file_name"])
    opened = min(len(images), OPENED)
    return Split(name, root, ann_file, prefix + "/", classes, len(images), len(annotations), opened)


def _read(path: Path) -> dict[str, list[Any]]:
    text = path.read_bytes()
    if not text.strip():
        raise DemoError(f"{path} is empty: expected COCO JSON")
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DemoError(f"{path} is not JSON: {error}") from None
    keys = ("images", "annotations", "categories")
    wrong = [key for key in keys if not isinstance(data, dict) or not isinstance(data.get(key), list)]
    if wrong:
        found = f"keys {sorted(data)}" if isinstance(data, dict) else f"a {type(data).__name__}"
        raise DemoError(f"{path} is not COCO JSON: expected an object with lists {list(keys)}, found {found}")
    return data


def _field(path: Path, table: str, i: int, row: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(k.__name__ for k in kinds)
        raise DemoError(f'{path}: {table}[{i}] needs "{key}" of type {names}, found {value!r}')
    return value


def _check_image(path: Path, i: int, row: Any, folder: Path) -> None:
    for key in ("width", "height"):
        if _field(path, "images", i, row, key, int) < 1:
            raise DemoError(f'{path}: images[{i}] has "{key}" {row[key]}, expected at least 1 pixel')
    name = _field(path, "images", i, row, "file_name", str)
    if leaves_folder(name):
        raise DemoError(
            f"{path}: images[{i}] has file_name {name!r}, which leaves the data folder {folder}: write it relative to it"
        )
    if not (folder / name).is_file():
        raise DemoError(f"{path}: images[{i}]: image {folder / name} is missing")


def _check_file(path: Path, i: int, row: Any, file: Path) -> None:
    """Compare an image file's header with its entry; pixels are not read."""
    try:
        with Image.open(file) as image:
            size = image.size
            # The loader turns an image by its EXIF orientation; 5 to 8 swap its sides.
            turned = size[::-1] if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8) else size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DemoError(
            f"{path}: images[{i}]: {file} is not an image that can be read: {error}. Replace the file, or take the entry out"
        ) from None
    if turned != (row["width"], row["height"]):
        raise DemoError(
            f"{path}: images[{i}] says width {row['width']}, height {row['height']}, but {file} is "
            f"{turned[0]} wide, {turned[1]} high{' by its EXIF orientation' if turned != size else ''}: "
            "write the file's size, and boxes in its pixels"
        )


def _check_usable(path: Path, images: list[Any], annotations: list[Any]) -> None:
    """At least one box must be left of those that mmdet's loader drops."""
    sizes = {row["id"]: (row["width"], row["height"]) for row in images}
    counts = {
        "crowd regions (iscrowd 1)": 0,
        "ignored": 0,
        "outside their image": 0,
        "thinner than 1 pixel or of area 0": 0,
    }
    crowd, ignored, outside, thin = counts
    for row in annotations:
        (x, y, w, h), (width, height) = row["bbox"], sizes[row["image_id"]]
        if row.get("iscrowd"):
            counts[crowd] += 1
        elif row.get("ignore"):
            counts[ignored] += 1
        elif w < 1 or h < 1 or row["area"] <= 0:
            counts[thin] += 1
        elif min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
            counts[outside] += 1
        else:
            return
    found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    first = f"the first is annotations[0] with bbox {annotations[0]['bbox']}, area {annotations[0]['area']}"
    raise DemoError(
        f"{path}: none of the {len(annotations)} annotations is a box to learn or to find: {found}; {first}. "
        "Expected at least one with bbox [x, y, width, height] in pixels inside its image, area above 0 and iscrowd 0"
    )


def leaves_folder(name: str) -> bool:
    """Whether a relative file name is absolute or climbs out of its folder, on any system.

    >>> leaves_folder("a/b.png"), leaves_folder("../b.png"), leaves_folder("a/../../b.png"), leaves_folder("C:\\\\b.png")
    (False, True, True, True)
    """
    windows = PureWindowsPath(name)
    if not name or PurePosixPath(name).is_absolute() or windows.anchor:
        return True
    depth = 0
    for part in windows.parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return True
    return False


def _check_annotation(path: Path, i: int, row: Any, images: set[int], categories: set[int]) -> None:
    for key, known in (("image_id", images), ("category_id", categories)):
        value = _field(path, "annotations", i, row, key, int)
        if value not in known:
            raise DemoError(f"{path}: annotations[{i}] has {key} {value}, which no entry declares")
    box = _field(path, "annotations", i, row, "bbox", list)
    numbers = len(box) == 4 and all(isinstance(v, (int, float)) and math.isfinite(v) for v in box)
    if not numbers or box[2] < 0 or box[3] < 0:
        raise DemoError(
            f"{path}: annotations[{i}] has bbox {box}, expected [x, y, width, height], finite, sides >= 0"
        )
    _field(path, "annotations", i, row, "area", (int, float))
