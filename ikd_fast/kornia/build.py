"""kornia augmentations from config dicts, and which of them can move boxes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import kornia.augmentation as K
from torch import nn

# Their pixels move by no matrix: kornia leaves boxes where they were.
_WARPS = (K.RandomElasticTransform, K.RandomThinPlateSpline, K.RandomFisheye)


def build_augmentations(augs: Sequence[Mapping[str, Any] | nn.Module]) -> list[nn.Module]:
    """Modules of ``augs``: ``dict(type="RandomErasing", p=0.5, ...)`` by class name in ``kornia.augmentation``, or objects.

    Raises:
        ValueError: a name kornia does not have; an augmentation that warps pixels by no matrix (boxes would stay behind), that
            mixes images (MixUp, Mosaic, Jigsaw: one image at a time is given), or that is not for 2D images (containers included).

    >>> build_augmentations([dict(type="RandomHorizontalFlip", p=0.5)])
    [RandomHorizontalFlip(p=0.5, p_batch=1.0, same_on_batch=False)]
    """
    if isinstance(augs, (Mapping, nn.Module)):
        augs = [augs]
    if not augs:
        raise ValueError(
            "augs: expected at least one augmentation, got none; write augs=[dict(type='RandomHorizontalFlip', p=0.5)]"
        )
    built = [_build(aug) for aug in augs]
    for aug in built:
        _check(aug)
    return built


def _build(aug: Mapping[str, Any] | nn.Module) -> nn.Module:
    if isinstance(aug, nn.Module):
        return aug
    if not isinstance(aug, Mapping) or "type" not in aug:
        raise TypeError(
            f"augs: expected dict(type='RandomErasing', ...) or a kornia augmentation, got {aug!r}"
        )
    kwargs = {
        key: tuple(value) if isinstance(value, list) else value for key, value in aug.items() if key != "type"
    }
    kind = aug["type"]
    if isinstance(kind, str):
        name = kind.removeprefix("kornia.augmentation.")
        kind = getattr(K, name, None) if name in K.__all__ else None
        if kind is None:
            near = difflib.get_close_matches(name, K.__all__, n=3)
            raise ValueError(
                f"kornia.augmentation has no {name!r}" + (f"; nearest: {', '.join(near)}" if near else "")
            )
    return kind(**kwargs)


def _check(aug: nn.Module) -> None:
    name = type(aug).__name__
    if isinstance(aug, _WARPS):
        raise ValueError(
            f"{name} warps pixels by no matrix and leaves boxes where they were; leave it out of augs"
        )
    if isinstance(aug, K.MixAugmentationBaseV2):
        raise ValueError(
            f"{name} mixes images or their parts; here an augmentation sees one image at a time, so that its draw depends on "
            "that image alone: leave it out of augs"
        )
    if not isinstance(aug, K.AugmentationBase2D):
        raise ValueError(
            f"augs: expected 2D augmentations of kornia (AugmentationBase2D) one by one, got {name}; of a container give the children, "
            "with random_apply= where some are chosen"
        )


def geometric_only(augs: Sequence[nn.Module]) -> bool:
    """Whether all of them only move pixels, so that the scale of the values does not matter."""
    return all(isinstance(aug, K.GeometricAugmentationBase2D) for aug in augs)
