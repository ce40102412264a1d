"""Inconsistent Knowledge Distillation for object detectors.

Names are imported on first use: ``import ikd_fast`` loads nothing, and the names below need only torch and numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "ACMLoss": "losses",
    "AdaptiveFreqAug": "augment",
    "AdvFeatureLoss": "losses",
    "AugPlan": "augment",
    "CWDLoss": "losses",
    "DistillContext": "losses",
    "FGDLoss": "losses",
    "FKDLoss": "losses",
    "FrozenTeacher": "distill",
    "IKD": "distill",
    "KDLoss": "losses",
    "L1Loss": "losses",
    "L2Loss": "losses",
    "MGDLoss": "losses",
    "NADLoss": "losses",
    "OnlineDIFGSM": "attack",
    "PKDLoss": "losses",
    "PixelUnits": "pixels",
    "SSIMLoss": "losses",
    "build_loss": "losses",
    "register_loss": "losses",
    "stable_id": "kernels.reference.philox",
}

__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:
    from .attack import OnlineDIFGSM as OnlineDIFGSM
    from .augment import AdaptiveFreqAug as AdaptiveFreqAug
    from .augment import AugPlan as AugPlan
    from .distill import IKD as IKD
    from .distill import FrozenTeacher as FrozenTeacher
    from .kernels.reference.philox import stable_id as stable_id
    from .losses import ACMLoss as ACMLoss
    from .losses import AdvFeatureLoss as AdvFeatureLoss
    from .losses import CWDLoss as CWDLoss
    from .losses import DistillContext as DistillContext
    from .losses import FGDLoss as FGDLoss
    from .losses import FKDLoss as FKDLoss
    from .losses import KDLoss as KDLoss
    from .losses import L1Loss as L1Loss
    from .losses import L2Loss as L2Loss
    from .losses import MGDLoss as MGDLoss
    from .losses import NADLoss as NADLoss
    from .losses import PKDLoss as PKDLoss
    from .losses import SSIMLoss as SSIMLoss
    from .losses import build_loss as build_loss
    from .losses import register_loss as register_loss
    from .pixels import PixelUnits as PixelUnits


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'ikd_fast' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
