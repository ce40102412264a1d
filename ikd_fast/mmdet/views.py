"""Where a loaded image lies in the one its perturbation is kept for, from what mmdet's transforms write down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ikd_fast.attack.memory import View

from .pipeline_checks import HOMOGRAPHY, META_KEYS


def loader_view(metainfo: Mapping[str, Any], resolution: str = "original") -> View:
    """The view that a pipeline made of its file's image.

    From ``homography_matrix`` (original pixel edges to loaded ones, so a mirror is x' = w - x) where it is packed; else from
    ``scale_factor``, ``flip`` and ``flip_direction``, which say all of a pipeline that only resizes and flips; what is not there
    has not been done (:func:`~ikd_fast.mmdet.pipeline_checks.check_pipeline` sees to it that it is packed).

    Args:
        metainfo: of a data sample.
        resolution: canonical is the file's image (``"original"``, ``ori_shape``) or that image after its resize, before flip and
            crop (``"network"``).

    Raises:
        ValueError: a rotation or shear; no ``ori_shape`` or ``img_shape``; an ``img_shape`` that the resize alone does not give.
    """
    place = metainfo.get("img_path", "an image")
    lacking = [key for key in ("ori_shape", "img_shape") if key not in metainfo]
    if lacking:
        raise ValueError(
            f"{place}: a perturbation that is kept follows its image by {list(META_KEYS)}; there is no {lacking}: write them into "
            "the meta_keys of PackDetInputs, or leave meta_keys out"
        )
    original = _size(metainfo["ori_shape"])
    size = _size(metainfo["img_shape"])
    across, down = (float(v) for v in metainfo.get("scale_factor", (1.0, 1.0))[:2])
    resized = (max(1, round(original[0] * down)), max(1, round(original[1] * across)))
    if metainfo.get(HOMOGRAPHY) is not None:
        try:
            view = View.from_homography(metainfo[HOMOGRAPHY], original, size)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        return view.from_resized(resized) if resolution == "network" else view
    if resized != size:
        raise ValueError(
            f"{place}: resized by scale_factor ({across:g}, {down:g}) its {original[0]} x {original[1]} pixels are {resized[0]} x "
            f"{resized[1]}, but img_shape is {size[0]} x {size[1]}: something else moved them. Pack the geometry: "
            f"dict(type='PackDetInputs', meta_keys=(..., {HOMOGRAPHY!r}))"
        )
    view = View.identity(size) if resolution == "network" else View.identity(original).resize(size)
    direction = metainfo.get("flip_direction") if metainfo.get("flip") else None
    return view.flip(direction in ("horizontal", "diagonal"), direction in ("vertical", "diagonal"))


def check_sizes(views: Sequence[View], samples: Sequence[Any]) -> None:
    """Raise where the network's images are not what the views say: a batch augment has resized them."""
    for view, sample in zip(views, samples, strict=True):
        size = _size(sample.metainfo["img_shape"])
        if size != view.size:
            raise ValueError(
                f"{sample.metainfo.get('img_path', 'an image')} is {size[0]} x {size[1]} after the data preprocessor, {view.size[0]} x "
                f"{view.size[1]} before: a batch augment that resizes or crops cannot be followed by a perturbation that is kept. Leave "
                "it out of batch_augments, or write mode='single', which keeps nothing"
            )


def _size(shape: Sequence[int]) -> tuple[int, int]:
    return int(shape[0]), int(shape[1])
