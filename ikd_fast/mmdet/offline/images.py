"""Which images are attacked, at which size, and how they are read."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ikd_fast.mmdet.errors import InputError
from ikd_fast.mmdet.memory import fingerprint
from ikd_fast.mmdet.pipeline_checks import fixed_resize, leaves
from ikd_fast.mmdet.samples import image_key

from mmcv.transforms import Compose
from mmdet.registry import DATASETS, TRANSFORMS

META_KEYS = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")


@dataclass(frozen=True)
class Image:
    """One image of a data set: where it is, its key and its file."""

    leaf: int
    index: int
    key: int
    name: str | None
    size: tuple[int, int]


class TrainingImages:
    """Every image of a training set once, as the net sees it: read, resized, its boxes with it; no flip, crop or colour.

    Args:
        cfg: of an mmdet run; its ``train_dataloader.dataset``.
        resize: ``None``: the pipeline's own fixed Resize; ``(width, height)``: one that keeps the aspect within it; ``"none"``: as in the
            file.

    Attributes:
        images: each image once, by size, small ones first, then in the data set's order.
        size: how the size comes about, for the manifest.

    Raises:
        InputError: no data set, no images, or a pipeline without one fixed Resize and no ``resize``.
    """

    def __init__(self, cfg: Any, name: str, *, resize: str | tuple[int, int] | None = None) -> None:
        loader = cfg.get("train_dataloader")
        if not loader:
            raise InputError(f"{name} has no train_dataloader: whose images shall be attacked?")
        try:
            # What a config of a later training reads need not be there yet.
            self.dataset = DATASETS.build(_without(loader["dataset"], "LoadAdversarialImage"))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{name}: the training data is not there: {error}; point train_dataloader.dataset at it, e.g. --cfg-options "
                "train_dataloader.dataset.data_root=FOLDER/"
            ) from error
        self._leaves, rules = [], []
        for leaf, transforms in leaves(self.dataset, "train_dataloader.dataset"):
            rule, text = _rule(transforms, resize)
            leaf.pipeline = Compose([*_loading(transforms, name), *rule, _packing()])
            self._leaves.append(leaf)
            rules.append(text)
        self.size = "original" if resize == "none" else f"network {', '.join(sorted(set(rules)))}"
        found: dict[int, Image] = {}
        self._all: list[tuple[int, tuple[int, int]]] = []
        for k, leaf in enumerate(self._leaves):
            for i in range(len(leaf)):
                info = leaf.get_data_info(i)
                key = image_key(info)
                size = int(info.get("height") or 0), int(info.get("width") or 0)
                name = info.get("img_path")
                first = found.setdefault(key, Image(k, i, key, name, size))
                if first.name != name:
                    raise InputError(
                        f"{first.name} and {name} have one key, that of folder, file name and image id: their files, and in a training "
                        "their draws, would be the same. Rename a folder"
                    )
                self._all.append((key, size))
        if not found:
            raise InputError(
                f"{name}: the training set has no images; check ann_file, data_prefix, metainfo's classes and filter_cfg of "
                "train_dataloader.dataset"
            )
        # Neighbours of one size need no padding. Which are neighbours must not depend on what is there already.
        self.images = sorted(found.values(), key=lambda image: image.size)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fingerprint(self) -> str:
        """Of the keys and sizes of the images, as memories have it."""
        return fingerprint(self._all)

    def __getitem__(self, place: int) -> dict[str, Any] | InputError:
        """What the data preprocessor takes of one image; or, where it cannot be read, an error that names the file."""
        image = self.images[place]
        try:
            found = self._leaves[image.leaf].prepare_data(image.index)
        except Exception as error:  # whatever a loader or a decoder makes of a broken file
            return InputError(f"{image.name}: cannot be read ({type(error).__name__}: {error})")
        if found is None:
            return InputError(f"{image.name}: its pipeline gives nothing")
        if len(found["inputs"]) != 3 or found["inputs"].dtype != torch.uint8:
            got = f"{found['inputs'].dtype} of {len(found['inputs'])}"
            return InputError(f"{image.name}: expected uint8 of 3 channels, got {got}")
        return found


def _without(config: Any, kind: str) -> Any:
    """A config with every transform of that type taken out of its lists."""
    if isinstance(config, Mapping):
        return {key: _without(value, kind) for key, value in config.items()}
    if not isinstance(config, (list, tuple)):
        return config
    kept = [
        v for v in config if not (isinstance(v, Mapping) and str(v.get("type")).rpartition(".")[2] == kind)
    ]
    return type(config)(_without(v, kind) for v in kept)


def _rule(transforms: list[tuple[str, Any]], resize: Any) -> tuple[list[Any], str]:
    if resize == "none":
        return [], "original"
    if resize is not None:
        step = TRANSFORMS.build(dict(type="Resize", scale=tuple(resize), keep_ratio=True))
        return [step], f"{tuple(resize)} keep_ratio"
    rule, why = fixed_resize(transforms)
    if rule is None:
        raise InputError(
            f"no one Resize of the training pipeline says at which size to attack an image: {why}. Write --resize WIDTHxHEIGHT, or "
            "--resize none for the size of its file",
            usage=True,
        )
    return [rule], f"{rule.scale or rule.scale_factor}{' keep_ratio' if rule.keep_ratio else ''}"


def _loading(transforms: Sequence[tuple[str, Any]], name: str) -> list[Any]:
    """The pipeline's own way to read an image, and boxes with labels whatever else it loads."""
    readers = [t for _, t in transforms if any(k.__name__ == "LoadImageFromFile" for k in type(t).__mro__)]
    if len(readers) != 1:
        raise InputError(
            f"{name}: expected one LoadImageFromFile in the train pipeline, found {len(readers)}"
        )
    reader = copy.copy(readers[0])
    reader.to_float32 = False  # files are uint8, and so is what a Resize has rounded
    return [reader, TRANSFORMS.build(dict(type="LoadAnnotations", with_bbox=True))]


def _packing() -> Any:
    return TRANSFORMS.build(dict(type="PackDetInputs", meta_keys=META_KEYS))


def file_size(info: Mapping[str, Any]) -> tuple[int, int]:
    """(h, w) of an image's own file."""
    height, width = info["ori_shape"][:2]
    return int(height), int(width)
