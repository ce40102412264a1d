"""Find the splits of a COCO-format data set and check them before anything is trained."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ikd_fast.demo.errors import DemoError

LAYOUTS = (("annotations/{}.json", "{}"), ("annotations/instances_{}2017.json", "{}2017"))
"""(annotation file, image folder) below the root, with the split's name for ``{}``."""


@dataclass(frozen=True)
class Split:
    """One checked split. ``classes`` are in the order of the file, which is the order of mmdet's labels."""

    name: str
    root: Path
    ann_file: str
    prefix: str
    classes: tuple[str, ...]
    images: int
    boxes: int


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
    raise DemoError(f"annotation file missing: expected {wanted}")


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
    return Split(name, root, ann_file, prefix + "/", classes, len(images), len(annotations))


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
