"""mmdet data sets as a source of host samples, and their batches as mmdet's models take them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ikd_fast.augment import AdaptiveFreqAug, AugPlan
from ikd_fast.dali.engine import to_torch
from ikd_fast.dali.errors import BadImage
from ikd_fast.dali.host_sample import HostSample, Skipped

from mmdet.datasets import CocoDataset
from mmengine.dataset import BaseDataset, ClassBalancedDataset, Compose, ConcatDataset, RepeatDataset

from .host_transforms import RECORD, UNUSABLE, Pixels, changes_levels, host_transforms


class HostFetch:
    """``dataset.__getitems__`` for torch's loaders: :class:`HostSample` or :class:`Skipped` for each index.

    An image that a transform rejects (a crop without boxes) is replaced as mmengine does it, by another drawn at random; one
    that cannot be read is not.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, indices: Iterable[int]) -> list[HostSample | Skipped]:
        return [self._load(int(index)) for index in indices]

    def _load(self, index: int) -> HostSample | Skipped:
        leaf, inner = _leaf(self.dataset, index)
        for _ in range(leaf.max_refetch + 1):
            try:
                packed = leaf.prepare_data(inner)
            except BadImage as error:
                return Skipped(error.path, error.reason)
            except (ValueError, TypeError, KeyError, IndexError) as error:
                # Annotations that mmdet's transforms take for granted, e.g. masks of another size.
                path = leaf.get_data_info(inner).get("img_path", f"image {inner}")
                return Skipped(path, f"its annotations cannot be used ({type(error).__name__}: {error})")
            if packed is not None:
                pixels = packed[RECORD]
                sample = packed["data_samples"]
                return HostSample(
                    sample.metainfo["img_path"],
                    pixels.encoded,
                    sample.metainfo["ori_shape"],
                    pixels.steps,
                    pixels.gain,
                    payload=(sample, pixels),
                )
            inner = leaf._rand_another()
        raise RuntimeError(
            f"{type(leaf).__name__}: {leaf.max_refetch} images in a row were rejected by the pipeline; check its crops and filters"
        )


@contextmanager
def noting_unusable_boxes() -> Iterator[None]:
    """While data sets are built: mmdet's ``CocoDataset`` leaves out boxes that are not numbers, without a word.

    Such an image gets an instance that says so, for whoever reads it.
    """
    original = CocoDataset.parse_data_info

    def parse(self: Any, raw: dict) -> Any:
        parsed = original(self, raw)
        boxes = [annotation.get("bbox") for annotation in raw["raw_ann_info"]]
        unusable = [box for box in boxes if not _finite(box)]
        if unusable and isinstance(parsed, dict):
            parsed["instances"].append(
                {"bbox": [0.0] * 4, "bbox_label": 0, "ignore_flag": 1, UNUSABLE: unusable[0]}
            )
        return parsed

    CocoDataset.parse_data_info = parse
    try:
        yield
    finally:
        CocoDataset.parse_data_info = original


def _finite(box: Any) -> bool:
    return len(box) == 4 and all(isinstance(v, (int, float)) and math.isfinite(v) for v in box)


def prepare(dataset: Any) -> bool:
    """Let a data set's items be host samples; its pipelines are replaced by their pixel-free form.

    Returns:
        whether any of them changes grey levels.

    Raises:
        TypeError: not an mmdet data set, or a wrapper that mixes images.
        ValueError: a pipeline that DALI cannot follow.
    """
    gain = False
    for leaf in _leaves(dataset):
        gain |= changes_levels(leaf.pipeline.transforms)
        leaf.pipeline = Compose(host_transforms(leaf.pipeline.transforms))
    dataset.__getitems__ = HostFetch(dataset)
    return gain


def _leaves(dataset: Any) -> Iterable[Any]:
    if isinstance(dataset, ConcatDataset):
        for child in dataset.datasets:
            yield from _leaves(child)
    elif isinstance(dataset, (RepeatDataset, ClassBalancedDataset)):
        yield from _leaves(dataset.dataset)
    elif isinstance(dataset, BaseDataset):
        yield dataset
    else:
        raise TypeError(
            f"DALIDetLoader(output='mmdet') expects an mmdet data set, or ConcatDataset, RepeatDataset or ClassBalancedDataset of such; "
            f"got {type(dataset).__name__}"
        )


def _leaf(dataset: Any, index: int) -> tuple[Any, int]:
    while not isinstance(dataset, BaseDataset):
        found = dataset._get_ori_dataset_idx(index)
        if isinstance(dataset, ConcatDataset):
            dataset, index = dataset.datasets[found[0]], found[1]
        else:
            dataset, index = dataset.dataset, found
    return dataset, index


def collate(samples: list[HostSample], outputs: Any) -> dict[str, list[Any]]:
    """``inputs``: uint8 ``[3, H, W]`` views of DALI's memory (copies where noise was added); ``data_samples``."""
    images = [to_torch(outputs[i]).permute(2, 0, 1) for i in range(len(samples))]
    pixels: list[Pixels] = [sample.payload[1] for sample in samples]
    # A call for each epoch; data sets that are concatenated may have settings of their own.
    groups: dict[tuple[int, int], tuple[AdaptiveFreqAug, list[AugPlan], list[int]]] = {}
    for i, p in enumerate(pixels):
        if p.plan is not None and p.augment is not None:
            _, plans, places = groups.setdefault((id(p.augment), p.plan.epoch), (p.augment, [], []))
            plans.append(p.plan)
            places.append(i)
    for augment, plans, places in groups.values():
        done = augment.apply_noise([images[i] for i in places], AugPlan.cat(plans))
        for i, image in zip(places, done, strict=True):
            images[i] = image
    return {"inputs": images, "data_samples": [sample.payload[0] for sample in samples]}
