"""What an attack needs of the training pipeline, checked before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from mmdet.datasets.transforms import PackDetInputs

HOMOGRAPHY = "homography_matrix"
META_KEYS = ("ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")
_CACHED = ("CachedMosaic", "CachedMixUp", "CopyPaste", "MixUp", "Mosaic", "YOLOXMixUp")
_RESIZES = (
    "Resize",
    "FixScaleResize",
    "FixShapeResize",
    "RandomResize",
    "RandomChoiceResize",
    "ResizeShortestEdge",
)
# Where pixels go, and homography_matrix says so. Rotations and shears of GeomTransform do too, and are refused when they come.
_RECORDED = ("RandomFlip", "RandomCrop", "GeomTransform", "KeyedRandomCrop", "AdaptiveFreqAugTransform")
_UNRECORDED = (
    "Albu", "CenterCrop", "Expand", "InstaBoost", "MinIoURandomCrop", "RandomAffine", "RandomCenterCropPad", "RandomShift",
)  # fmt: skip
# Leave pixels where they are (or fill some): nothing to record.
_STILL = (
    "ColorTransform", "Corrupt", "CutOut", "FilterAnnotations", "LoadAnnotations", "LoadImageFromFile", "LoadProposals", "Normalize",
    "PackDetInputs", "PhotoMetricDistortion", "RandomChoice", "RandomApply", "RandomErasing", "RandomGrayscale", "RandomOrder",
    "SegRescale", "YOLOXHSVRandomAug", "Compose", "LoadEmptyAnnotations", "LoadMultiChannelImageFromFiles", "KeyedRandomness",
    "LoadAdversarialImage",
)  # fmt: skip

# Before adversarial images are loaded: reading, one resize, nothing that moves pixels or changes them.
_READING = (
    "LoadImageFromFile",
    "LoadAnnotations",
    "LoadProposals",
    "LoadEmptyAnnotations",
    "FilterAnnotations",
    *_RESIZES,
)
# Behind: what treats a stack of any number of channels as one image, without values of its own.
_ANY_CHANNELS = (
    *_RESIZES, "RandomFlip", "RandomCrop", "KeyedRandomCrop", "MinIoURandomCrop", "RandomShift", "FilterAnnotations", "PackDetInputs",
)  # fmt: skip
_CONTAINERS = ("KeyedRandomness", "Compose", "RandomApply", "RandomChoice", "RandomOrder")


def check_pipeline(dataset: Any, attack: Any) -> None:
    """Raise if ``attack`` cannot work on what ``dataset`` makes.

    An attack says what it needs by attributes: ``needs_stable_ids`` (an image is the same one in every epoch, since its
    perturbation is kept) and ``needs_views`` (where each pixel of an image comes from: ``scale_factor`` and ``flip`` say it of a
    pipeline that resizes and flips once, ``homography_matrix`` of others).

    Raises:
        ValueError: a pipeline that composes images under an attack that needs stable ids; a transform that moves pixels and does not
            record it, or meta keys that are not packed, under one that needs views. The message names the place and the line to write.
    """
    if attack is None:
        return
    if attack.mode == "offline":
        for place, transforms in _by_leaf(dataset):
            _require_adversarial(place, transforms)
    if getattr(attack, "needs_stable_ids", False):
        _refuse_composition(list(pipeline_of(dataset, "train_dataloader.dataset")), attack)
    if getattr(attack, "needs_views", False):
        for _, transforms in leaves(dataset, "train_dataloader.dataset"):
            _refuse_unrecorded(transforms, attack)
            _require_geometry(transforms, attack)


def _by_leaf(dataset: Any) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    for i, (_, transforms) in enumerate(leaves(dataset, "train_dataloader.dataset")):
        yield transforms[0][0] if transforms else f"data set {i}", transforms


def _require_adversarial(where: str, transforms: list[tuple[str, Any]]) -> None:
    """Raise unless adversarial images are loaded once, behind reading and resizing alone, and before what treats both as one."""
    line = "dict(type='LoadAdversarialImage', directory=...)"
    found = [i for i, (_, t) in enumerate(transforms) if _is(t, "LoadAdversarialImage")]
    if len(found) != 1:
        raise ValueError(
            f"attack OfflineImages: expected one LoadAdversarialImage in the pipeline of {where}, found {len(found)}; write {line} behind "
            "its Resize"
        )
    for place, t in transforms[: found[0]]:
        if not _is(t, *_READING, *_CONTAINERS):
            raise ValueError(
                f"{place} ({type(t).__name__}) comes before LoadAdversarialImage, which puts an image that only was read and resized "
                f"beside the one it is given: write {line} before it"
            )
    for place, t in transforms[found[0] + 1 :]:
        if not _is(t, *_ANY_CHANNELS, *_CONTAINERS) and not getattr(t, "any_channels", False):
            raise ValueError(
                f"{place} ({type(t).__name__}) comes behind LoadAdversarialImage and is not known to treat clean and adversarial image, "
                f"the channels 0 to 2 and 3 to 5, as one; those that do: {', '.join(sorted({*_ANY_CHANNELS}))}. Take it out "
                "(AdaptiveFreqAug is written augment=dict(type='AdaptiveFreqAug') in the model), or, if it is yours and does, give its "
                "class any_channels = True"
            )


def pipeline_of(dataset: Any, place: str) -> Iterator[tuple[str, Any]]:
    """``(place, transform)`` for every transform below a data set, whatever wraps it; places are written as in the config."""
    inner = getattr(dataset, "dataset", None)
    if inner is not None:
        yield from pipeline_of(inner, f"{place}.dataset")
    for i, child in enumerate(getattr(dataset, "datasets", None) or []):
        yield from pipeline_of(child, f"{place}.datasets[{i}]")
    yield from _own(dataset, place)


def _own(dataset: Any, place: str) -> Iterator[tuple[str, Any]]:
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


def leaves(dataset: Any, place: str) -> Iterator[tuple[Any, list[tuple[str, Any]]]]:
    """Every data set that is no wrapper, with the transforms its images go through, its wrappers' included."""
    own = list(_own(dataset, place))
    inner = getattr(dataset, "dataset", None)
    children = [(f"{place}.dataset", inner)] if inner is not None else []
    children += [
        (f"{place}.datasets[{i}]", d) for i, d in enumerate(getattr(dataset, "datasets", None) or [])
    ]
    if not children:
        yield dataset, own
    for where, child in children:
        for leaf, transforms in leaves(child, where):
            yield leaf, transforms + own


def fixed_resize(transforms: list[tuple[str, Any]]) -> tuple[Any, str]:
    """The one Resize by which a pipeline resizes every image, and ""; or None, and what is against it."""
    moving = [(place, t) for place, t in transforms if not _is(t, *_STILL, "RandomFlip")]
    resizes = [(place, t) for place, t in moving if _is(t, *_RESIZES)]
    if len(resizes) != 1:
        found = ", ".join(f"{place} ({type(t).__name__})" for place, t in resizes) or "no Resize"
        return None, f"expected one Resize, found {found}"
    place, resize = resizes[0]
    # A transform that runs all of its own, always, is as good as its list.
    always = [f"{where}.transforms[" for where, t in transforms if _is(t, "KeyedRandomness", "Compose")]
    within = place
    for prefix in sorted(always, key=len, reverse=True):
        within = within.removeprefix(prefix) if within.startswith(prefix) else within
    if type(resize).__name__ != "Resize" or ".transforms[" in within:
        return None, f"{place} is {type(resize).__name__}, which draws its scale or is not always applied"
    if moving[0][1] is not resize:
        return None, f"{moving[0][0]} ({type(moving[0][1]).__name__}) comes before the resize"
    others = [(p, t) for p, t in moving[1:] if not _is(t, "RandomCrop", "AdaptiveFreqAugTransform")]
    if others:
        return None, f"{others[0][0]} ({type(others[0][1]).__name__}) may resize too"
    return resize, ""


def _is(transform: Any, *names: str) -> bool:
    return any(kind.__name__ in names for kind in type(transform).__mro__)


def _refuse_unrecorded(transforms: list[tuple[str, Any]], attack: Any) -> None:
    found = [f"{place} ({type(t).__name__})" for place, t in transforms if _is(t, *_UNRECORDED)]
    if found:
        raise ValueError(
            f"attack mode {attack.mode!r} follows each image through the pipeline, but {', '.join(found)} moves pixels without writing "
            f"it into {HOMOGRAPHY}: the perturbation would be put in the wrong place. Write attack=dict(type='OnlineDIFGSM', "
            "mode='single'), which keeps nothing, or take those transforms out (RandomCrop does record)"
        )


def _require_geometry(transforms: list[tuple[str, Any]], attack: Any) -> None:
    """The meta keys that say where pixels come from: those of one resize and one flip, and the matrix where there is more."""
    resizes = [entry for entry in transforms if _is(entry[1], *_RESIZES)]
    flips = [entry for entry in transforms if _is(entry[1], "RandomFlip")]
    others = [entry for entry in transforms if not _is(entry[1], *_STILL, *_RESIZES, "RandomFlip")]
    more = others + resizes[1:] + flips[1:]
    needed = META_KEYS[:2] + META_KEYS[2:3] * bool(resizes) + META_KEYS[3:] * bool(flips)
    needed += (HOMOGRAPHY,) if more else ()
    packers = [(place, t.meta_keys) for place, t in transforms if isinstance(t, PackDetInputs)]
    lacking = [(place, keys) for place, keys in packers if not set(needed) <= set(keys)]
    if packers and not lacking:
        return
    default = inspect.signature(PackDetInputs).parameters["meta_keys"].default
    place, keys = lacking[0] if lacking else ("the end of the train pipeline", default)
    missing = tuple(key for key in needed if key not in keys)
    because = ", ".join(f"{where} ({type(t).__name__})" for where, t in more[:3])
    because = f"; {because} is more than one resize and one flip" if more else ""
    raise ValueError(
        f"attack mode {attack.mode!r} follows each image through the pipeline{because}. It needs {', '.join(missing)}, which {place} "
        f"does not pack; write there\n"
        f"    dict(type='PackDetInputs', meta_keys={(*keys, *missing)!r})"
    )
