"""The numbers of the published configurations, by detector family.

From the IKD repository's configs (COCO, 8 GPUs x 2 images): RetinaNet, RepPoints and Mask R-CNN students with
ResNet-50. The first two distil all five pyramid levels, Mask R-CNN levels 0..3 of its five.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("ikd_fast")

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "retinanet": {
        "FGDLoss": {
            "temperature": 0.5,
            "alpha": 1e-3,
            "beta": 5e-4,
            "gamma": 5e-4,
            "lambda_": 5e-6,
            "levels": None,
        },
        "MGDLoss": {"alpha": 2e-5, "mask_ratio": 0.65, "levels": None},
        "IKD": {"beta": 1e-5, "levels": None},
    },
    "reppoints": {
        "FGDLoss": {
            "temperature": 0.5,
            "alpha": 1.6e-3,
            "beta": 8e-4,
            "gamma": 8e-4,
            "lambda_": 8e-6,
            "levels": None,
        },
        "MGDLoss": {"alpha": 2e-5, "mask_ratio": 0.65, "levels": None},
        "IKD": {"beta": 1e-5, "levels": None},
    },
    "mask_rcnn": {
        "FGDLoss": {
            "temperature": 0.5,
            "alpha": 5e-5,
            "beta": 2.5e-5,
            "gamma": 5e-5,
            "lambda_": 5e-7,
            "levels": (0, 1, 2, 3),
        },
        "MGDLoss": {"alpha": 5e-7, "mask_ratio": 0.45, "levels": (0, 1, 2, 3)},
        "IKD": {"beta": 2.5e-7, "levels": (0, 1, 2, 3)},
    },
}


def preset_names() -> list[str]:
    """The valid values of ``preset=``."""
    return sorted(PRESETS)


def preset_values(preset: str, system: str) -> dict[str, Any]:
    """The published numbers of ``system``: "FGDLoss", "MGDLoss", or "IKD" (the adversarial term's).

    >>> preset_values("mask_rcnn", "IKD")["beta"]
    2.5e-07
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; valid: {', '.join(preset_names())}")
    if system not in PRESETS[preset]:
        raise ValueError(
            f"preset {preset!r} has no numbers for {system!r}; it has them for {', '.join(PRESETS[preset])}"
        )
    return dict(PRESETS[preset][system])


def resolve(
    system: str, preset: str | None, given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Defaults, the preset's numbers over them, those ``given`` (None: not given) on top; logs the preset."""
    values = dict(defaults)
    explicit = {k: v for k, v in given.items() if v is not None}
    if preset is not None:
        published = preset_values(preset, system)
        values.update(published)
        taken = {k: "all" if v is None else v for k, v in published.items() if k not in explicit}
        shown = ", ".join(f"{k.rstrip('_')}={v}" for k, v in taken.items())
        kept = ", ".join(f"{k.rstrip('_')}={explicit[k]}" for k in published if k in explicit)
        logger.info("%s preset %r sets %s%s", system, preset, shown, f"; as given: {kept}" if kept else "")
    values.update(explicit)
    return values
