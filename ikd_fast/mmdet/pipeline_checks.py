"""What an attack needs of the training pipeline, checked before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from mmdet.datasets.transforms import PackDetInputs

HOMOGRAPHY = "homography_matrix"
_CACHED = ("CachedMosaic", "CachedMixUp", "CopyPaste", "MixUp", "Mosaic", "YOLOXMixUp")


def check_pipeline(dataset: Any, attack: Any) -> None:
    """Raise if ``attack`` cannot work on what ``dataset`` makes.

    An attack says what it needs by attributes: ``needs_stable_ids`` (an image is the same one in every epoch, since its
    perturbation is kept) and ``needs_homography`` (the geometry of each image is in ``homography_matrix``).

    Raises:
        ValueError: a pipeline that composes images under an attack that needs stable ids; no ``homography_matrix`` in the
            packed meta keys under one that needs it. The message names the place and the line to write.
    """
    if attack is None:
        return
    transforms = list(pipeline_of(dataset, "train_dataloader.dataset"))
    if getattr(attack, "needs_stable_ids", False):
        _refuse_composition(transforms, attack)
    if getattr(attack, "needs_homography", False):
        _require_homography(transforms, attack)


def pipeline_of(dataset: Any, place: str) -> Iterator[tuple[str, Any]]:
    """``(place, transform)`` for every transform below a data set, whatever wraps it; places are written as in the config."""
    inner = getattr(dataset, "dataset", None)
    if inner is not None:
        yield from pipeline_of(inner, f"{place}.dataset")
    for i, child in enumerate(getattr(dataset, "datasets", None) or []):
        yield from pipeline_of(child, f"{place}.datasets[{i}]")
    pipeline = getattr(dataset, "pipeline", None)
    transforms = getattr(pipeline, "transforms", pipeline if isinstance(pipeline, (list, tuple)) else [])
    yield from _nested(transforms, f"{place}.pipeline")


def _nested(transforms: Any, place: str) -> Iterator[tuple[str, Any]]:
    for i, transform in enumerate(transforms):
        here = f"{place}[{i}]"
        yield here, transform
        inner = getattr(transform, "transforms", None)
        # RandomChoice holds Compose objects, TransformBroadcaster and its like hold one.
        inner = getattr(inner, "transforms", inner)
        if isinstance(inner, (list, tuple)):
            yield from _nested(inner, f"{here}.transforms")


def composes(transform: Any) -> bool:
    """Whether a transform puts several images into one: it asks its data set for more, or is one of mmdet's that do."""
    asks = hasattr(transform, "get_indexes") or hasattr(transform, "get_indices")
    return asks or any(kind.__name__ in _CACHED for kind in type(transform).__mro__)


def _refuse_composition(transforms: list[tuple[str, Any]], attack: Any) -> None:
    found = [
        f"{place} ({type(transform).__name__})" for place, transform in transforms if composes(transform)
    ]
    if found:
        raise ValueError(
            f"attack mode {attack.mode!r} keeps a perturbation for each image from epoch to epoch, but the pipeline composes images "
            f"of several: {', '.join(found)}; such an image is never the same again. Write attack=dict(type='OnlineDIFGSM', "
            "mode='single'), which keeps nothing, or take those transforms out"
        )


def _require_homography(transforms: list[tuple[str, Any]], attack: Any) -> None:
    packers = [(place, t) for place, t in transforms if isinstance(t, PackDetInputs)]
    lacking = [(place, t) for place, t in packers if HOMOGRAPHY not in t.meta_keys]
    if packers and not lacking:
        return
    place, keys = (
        "the end of the train pipeline",
        inspect.signature(PackDetInputs).parameters["meta_keys"].default,
    )
    if lacking:
        place, keys = lacking[0][0], lacking[0][1].meta_keys
    raise ValueError(
        f"attack mode {attack.mode!r} follows each image through resize and flip by its {HOMOGRAPHY}, which "
        f"{place} does not pack; write there\n"
        f"    dict(type='PackDetInputs', meta_keys={(*keys, HOMOGRAPHY)!r})"
    )
