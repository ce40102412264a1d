"""The numbers of the published configurations, by detector family (COCO, 8 GPUs x 2 images, ResNet-50 students).

``FGDLoss``, ``MGDLoss`` and ``IKD`` (the adversarial term) on RetinaNet, RepPoints and Mask R-CNN: the IKD repository's
configs. The others, each from the code that publishes it:

- FGD on Faster R-CNN and GFL: the FGD repository. MGD on Faster R-CNN: the MGD repository.
- CWD: RetinaNet from mmdetection-distiller, GFL (for the class head's logits, ``source="bbox_head.gfl_cls"``) and Faster R-CNN
  from mmrazor.
- FKD: two-stage numbers as in mmrazor, which took them from the authors' code; one-stage numbers are six times those, as in
  public copies of the authors' code (the paper rounds them: 4e-4, 2e-2, 4e-4).
- SSIM: the paper found 2 or 4 best without saying which is whose; every level of the neck. PKD: mmrazor.

A family that is missing under a loss has no published numbers that we know of, but for FCOS: FGD's repository has those of
RepPoints with temperature 0.8 (``FGDLoss(preset="reppoints", temperature=0.8)``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("ikd_fast")

_FPN = (0, 1, 2, 3)
_SSIM = {"weight": 4.0, "levels": None}
_ONE_STAGE_FKD = {
    "tau": 0.5,
    "alpha": 4.2e-4,
    "beta": 2.4e-2,
    "gamma": 4.2e-4,
    "channel_attention": True,
    "levels": None,
}
_TWO_STAGE_FKD = {
    "tau": 0.5,
    "alpha": 7e-5,
    "beta": 4e-3,
    "gamma": 7e-5,
    "channel_attention": False,
    "levels": _FPN,
}
_ONE_STAGE_FGD = {
    "temperature": 0.5,
    "alpha": 1e-3,
    "beta": 5e-4,
    "gamma": 5e-4,
    "lambda_": 5e-6,
    "levels": None,
}
_TWO_STAGE_FGD = {
    "temperature": 0.5,
    "alpha": 5e-5,
    "beta": 2.5e-5,
    "gamma": 5e-5,
    "lambda_": 5e-7,
    "levels": _FPN,
}
_ONE_STAGE_MGD = {"alpha": 2e-5, "mask_ratio": 0.65, "levels": None}
_TWO_STAGE_MGD = {"alpha": 5e-7, "mask_ratio": 0.45, "levels": _FPN}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "retinanet": {
        "FGDLoss": _ONE_STAGE_FGD,
        "MGDLoss": _ONE_STAGE_MGD,
        "CWDLoss": {"tau": 1.0, "weight": 5.0, "levels": _FPN},
        "FKDLoss": _ONE_STAGE_FKD,
        "SSIMLoss": _SSIM,
        "PKDLoss": {"weight": 10.0, "levels": _FPN},
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
        "MGDLoss": _ONE_STAGE_MGD,
        "FKDLoss": _ONE_STAGE_FKD,
        "SSIMLoss": _SSIM,
        "PKDLoss": {"weight": 10.0, "levels": _FPN},
        "IKD": {"beta": 1e-5, "levels": None},
    },
    "faster_rcnn": {
        "FGDLoss": _TWO_STAGE_FGD,
        "MGDLoss": _TWO_STAGE_MGD,
        "CWDLoss": {"tau": 1.0, "weight": 10.0, "levels": None},
        "FKDLoss": _TWO_STAGE_FKD,
        "SSIMLoss": _SSIM,
        "PKDLoss": {"weight": 6.0, "levels": _FPN},
    },
    "mask_rcnn": {
        "FGDLoss": _TWO_STAGE_FGD,
        "MGDLoss": _TWO_STAGE_MGD,
        "FKDLoss": _TWO_STAGE_FKD,
        "IKD": {"beta": 2.5e-7, "levels": _FPN},
    },
    "gfl": {
        "FGDLoss": _ONE_STAGE_FGD,
        "CWDLoss": {"tau": 1.0, "weight": 5.0, "levels": None},
    },
}


def preset_names() -> list[str]:
    """The valid values of ``preset=``."""
    return sorted(PRESETS)


def preset_values(preset: str, system: str) -> dict[str, Any]:
    """The published numbers of ``system``: a loss's class name such as "FGDLoss", or "IKD" (the adversarial term's).

    >>> preset_values("mask_rcnn", "IKD")["beta"]
    2.5e-07
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; valid: {', '.join(preset_names())}")
    if system not in PRESETS[preset]:
        having = [name for name in preset_names() if system in PRESETS[name]]
        raise ValueError(
            f"preset {preset!r} has no numbers for {system!r}; presets that have: {', '.join(having) or 'none'}"
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
