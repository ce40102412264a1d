"""A COCO-format data set as a source of host samples, without mmdet: records as mmdet's ``CocoDataset`` makes them."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ikd_fast.augment import AdaptiveFreqAug, AugPlan
from ikd_fast.order import KeyedIndex, image_key

from . import steps
from .errors import BadImage
from .header import read_head
from .host_sample import HostSample, Skipped

IMAGE_KEYS, ANNOTATION_KEYS = ("id", "file_name", "width", "height"), ("image_id", "category_id")


@dataclass(frozen=True)
class Record:
    """One image of an annotation file.

    Attributes:
        path, image_id: of the image.
        boxes: float32 ``[n, 4]`` xyxy pixels.
        labels: int64 ``[n]``, places in ``classes``.
        crowd: bool ``[n]``.
        area: float32 ``[n]``, the annotation's own.
        segmentation: n of COCO's, or None where there is none.
        problem: why the image's annotations cannot be used; empty where they can.
    """

    path: str
    image_id: int | str
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    area: np.ndarray
    segmentation: tuple[Any, ...]
    problem: str = ""


class CocoImages(Dataset):
    """Images and boxes of a COCO annotation file, for ``DALIDetLoader(output="torch")``.

    What counts as a box is decided as in mmdet's ``CocoDataset``: those marked ``ignore``, outside the image, narrower or lower
    than a pixel, without area or of other categories are left out; crowds stay, marked ``iscrowd``.

    Args:
        ann_file: COCO JSON.
        image_dir: folder of its ``file_name``.
        classes: names, in the order of the labels. None: all categories, in the file's order.
        resize: (long, short) sides in pixels, ratio kept, as mmdet's ``Resize(scale=..., keep_ratio=True)``; None keeps images as they are.
        augment: :class:`ikd_fast.AdaptiveFreqAug` (its ``hflip_prob`` mirrors too), or None.
        flip_prob: of a mirror where ``augment`` is None.
        masks: also give ``masks``, uint8 ``[n, H, W]`` (needs pycocotools).
        filter_empty: leave out images without an annotation of ``classes``.
        min_size: leave out images with a shorter side, in pixels.
        seed: of the mirror where ``augment`` is None.

    Raises:
        ValueError: not a COCO file, classes that it does not have, an annotation of a category it does not list, no such folder,
            ``flip_prob`` with ``augment``.
    """

    def __init__(
        self,
        ann_file: str | Path,
        image_dir: str | Path,
        *,
        classes: Sequence[str] | None = None,
        resize: tuple[int, int] | None = (1333, 800),
        augment: AdaptiveFreqAug | None = None,
        flip_prob: float = 0.0,
        masks: bool = False,
        filter_empty: bool = True,
        min_size: int = 32,
        seed: int = 0,
    ) -> None:
        if augment is not None and flip_prob:
            raise ValueError(
                "CocoImages: the mirror is part of the plan: write AdaptiveFreqAug(hflip_prob=...) instead of flip_prob"
            )
        if resize is not None and not (
            isinstance(resize, (tuple, list))
            and len(resize) == 2
            and all(isinstance(side, int) and side >= 1 for side in resize)
        ):
            raise ValueError(
                f"CocoImages: resize must be (long, short) sides, whole numbers of pixels >= 1, or None, got {resize!r}"
            )
        if augment is not None and not isinstance(augment, AdaptiveFreqAug):
            raise TypeError(
                f"CocoImages: augment must be an ikd_fast.AdaptiveFreqAug or None, got {augment!r}"
            )
        if not isinstance(flip_prob, (int, float)) or not 0 <= flip_prob <= 1:
            raise ValueError(f"CocoImages: flip_prob must be in 0..1, got {flip_prob!r}")
        if isinstance(classes, str):
            raise TypeError(f"CocoImages: classes must be a list of names or None, got {classes!r}")
        if not Path(image_dir).is_dir():
            raise ValueError(f"CocoImages: image_dir {image_dir} is no folder")
        self.augment = augment or AdaptiveFreqAug(crop_prob=0, noise_prob=0, hflip_prob=flip_prob, seed=seed)
        self.seed = seed if augment is None else augment.seed
        self.resize, self.masks = resize, masks
        self.classes, self.records = read_coco(
            Path(ann_file), Path(image_dir), classes, filter_empty=filter_empty, min_size=min_size
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> HostSample | Skipped:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Iterable[int]) -> list[HostSample | Skipped]:
        return [self._load(index) for index in indices]

    def _load(self, index: int) -> HostSample | Skipped:
        if not isinstance(index, KeyedIndex):
            raise TypeError(
                f"CocoImages: expected indices of ikd_fast.dali.KeyedShardSampler, which say their epoch, got {type(index).__name__}"
            )
        record = self.records[int(index)]
        try:
            return self._sample(record, index.epoch)
        except BadImage as error:
            return Skipped(error.path, error.reason)

    def _sample(self, record: Record, epoch: int) -> HostSample:
        if record.problem:
            raise BadImage(record.path, record.problem)
        try:
            data = Path(record.path).read_bytes()
        except (OSError, ValueError) as error:  # the latter of a path with a NUL
            raise BadImage(record.path, getattr(error, "strerror", None) or str(error)) from None
        try:
            head = read_head(data)
        except ValueError as error:
            raise BadImage(record.path, str(error)) from None
        original = (head.height, head.width)
        size = original if self.resize is None else keep_ratio_size(original, self.resize)
        scale = (size[1] / original[1], size[0] / original[0])
        target = self._target(record, original, size, scale)
        try:
            plan = self.augment.plan(
                [target["boxes"]],
                [size],
                [image_key(record.path, record.image_id)],
                epoch,
                scale=[scale],
                ignore=[target["iscrowd"]],
            )
        except ValueError as error:
            raise BadImage(record.path, str(error)) from None
        canvas = torch.zeros((), dtype=torch.uint8).expand(3, *size)
        (moved,) = self.augment.apply_to_targets([canvas], [target], plan)
        x0, y0, x1, y1 = plan.window[0].tolist()
        return HostSample(
            record.path,
            np.frombuffer(data, np.uint8),
            original,
            (steps.resize(size), steps.crop((x0, y0, x1, y1))),
            sigma=float(plan.sigma[0]),
            mirror=bool(plan.flip[0]),
            payload=(moved, plan),
        )

    def _target(
        self, record: Record, original: tuple[int, int], size: tuple[int, int], scale: tuple[float, float]
    ) -> dict[str, Any]:
        boxes = torch.from_numpy(record.boxes) * torch.tensor([*scale, *scale], dtype=torch.float32)
        boxes[:, 0::2].clamp_(0, size[1])
        boxes[:, 1::2].clamp_(0, size[0])
        # Outside the image, where the annotation file has another size for it.
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
        target = {
            "boxes": boxes[inside],
            "labels": torch.from_numpy(record.labels)[inside],
            "image_id": record.image_id,
            "area": torch.from_numpy(record.area)[inside],
            "iscrowd": torch.from_numpy(record.crowd)[inside],
            "orig_size": original,
            "scale": scale,
            "size": size,
        }
        if self.masks:
            target["masks"] = _bitmaps(record, original, size)[inside]
        return target


def whole(plan: AugPlan) -> AugPlan:
    """The plan of images that have its window already."""
    window = torch.tensor([(0, 0, w, h) for h, w in plan.out_sizes], dtype=torch.int64, device="cpu")
    sizes = torch.tensor(plan.out_sizes, dtype=torch.int64, device="cpu").reshape(-1, 2)
    return replace(plan, window=window.reshape(-1, 4), sizes=sizes)


def keep_ratio_size(size: tuple[int, int], limits: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the largest image within the long and short side of ``limits``, each side rounded half up, as mmcv does.

    >>> keep_ratio_size((480, 640), (1333, 800))
    (800, 1067)
    """
    factor = min(max(limits) / max(size), min(limits) / min(size))
    return int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)


def read_coco(
    ann_file: Path, image_dir: Path, classes: Sequence[str] | None, *, filter_empty: bool, min_size: int
) -> tuple[tuple[str, ...], list[Record]]:
    """Class names, and the records in the file's order."""
    try:
        content = json.loads(ann_file.read_text())
        images, annotations, categories = (content[k] for k in ("images", "annotations", "categories"))
    except OSError as error:
        raise ValueError(f"{ann_file}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{ann_file}: expected a COCO file with images, annotations and categories ({type(error).__name__}: {error})"
        ) from None
    names = {category["id"]: category["name"] for category in categories}
    classes = tuple(names.values()) if classes is None else tuple(classes)
    for name in classes:
        if name not in names.values():
            near = difflib.get_close_matches(str(name), [*names.values()], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{ann_file}: no category {name!r}; it has {', '.join(names.values())}.{hint}")
    label_of = {i: classes.index(name) for i, name in names.items() if name in classes}
    for kind, rows, needed in (("image", images, IMAGE_KEYS), ("annotation", annotations, ANNOTATION_KEYS)):
        for row in rows:
            if lacking := [key for key in needed if row.get(key) is None]:
                raise ValueError(f"{ann_file}: {kind} {row.get('id')} has no {', '.join(lacking)}")
    files = {image["id"]: image["file_name"] for image in images}
    of_image: dict[Any, list[dict]] = {image["id"]: [] for image in images}
    for annotation in annotations:
        image_id = annotation["image_id"]
        if annotation["category_id"] not in names:
            raise ValueError(
                f"{ann_file}: annotation {annotation.get('id')} of {files.get(image_id, image_id)} has category "
                f"{annotation['category_id']}, which the file does not list"
            )
        if image_id in of_image:
            of_image[image_id].append(annotation)
    records = []
    for image in images:
        found = of_image[image["id"]]
        empty = not any(a["category_id"] in label_of for a in found)
        if (filter_empty and empty) or min(image["width"], image["height"]) < min_size:
            continue
        records.append(_record(image, found, label_of, image_dir))
    return classes, records


def _record(image: dict, annotations: list[dict], label_of: dict[int, int], image_dir: Path) -> Record:
    kept: list[tuple[list[float], int, bool, float, Any]] = []
    problem = ""
    for annotation in annotations:
        if annotation.get("ignore", False):
            continue
        box, area = annotation.get("bbox"), annotation.get("area")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_finite, box)):
            problem = (
                problem
                or f"annotation {annotation.get('id')}: expected bbox as four finite numbers, got {box}"
            )
            continue
        if area is not None and not _finite(area):
            problem = (
                problem or f"annotation {annotation.get('id')}: expected area as a finite number, got {area}"
            )
            continue
        x, y, w, h = box
        across = max(0, min(x + w, image["width"]) - max(x, 0))
        down = max(0, min(y + h, image["height"]) - max(y, 0))
        area = w * h if area is None else area
        if across * down == 0 or area <= 0 or w < 1 or h < 1 or annotation["category_id"] not in label_of:
            continue
        kept.append(
            (
                [x, y, x + w, y + h],
                label_of[annotation["category_id"]],
                bool(annotation.get("iscrowd", False)),
                area,
                annotation.get("segmentation"),
            )
        )
    return Record(
        path=str(image_dir / image["file_name"]),
        image_id=image["id"],
        boxes=np.array([row[0] for row in kept], dtype=np.float32).reshape(-1, 4),
        labels=np.array([row[1] for row in kept], dtype=np.int64),
        crowd=np.array([row[2] for row in kept], dtype=bool),
        area=np.array([row[3] for row in kept], dtype=np.float32),
        segmentation=tuple(row[4] for row in kept),
        problem=problem,
    )


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _bitmaps(record: Record, original: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """uint8 ``[n, h, w]``; nearest neighbour, as masks are resized everywhere."""
    from pycocotools import mask as coco_mask

    rows = []
    for i, shape in enumerate(record.segmentation):
        try:
            if isinstance(shape, list):
                shape = coco_mask.merge(coco_mask.frPyObjects(shape, *original))
            elif isinstance(shape["counts"], list):
                shape = coco_mask.frPyObjects(shape, *original)
            decoded = coco_mask.decode(shape)
        except Exception as error:  # pycocotools raises nothing more special
            got = "none" if shape is None else f"{type(error).__name__}: {error}"
            raise BadImage(record.path, f"mask of box {i}: expected polygons or RLE, got {got}") from None
        if decoded.shape != original:
            raise BadImage(
                record.path,
                f"mask of box {i} is of {decoded.shape[0]} x {decoded.shape[1]} pixels, the image of {original[0]} x {original[1]}",
            )
        rows.append(torch.from_numpy(decoded))
    if not rows:
        return torch.zeros((0, *size), dtype=torch.uint8)
    stacked = torch.stack(rows)[:, None].float()
    return F.interpolate(stacked, size, mode="nearest")[:, 0].to(torch.uint8)
