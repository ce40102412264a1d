"""Distillation losses: one object for the whole pyramid, its weights inside, built by name or by class."""

from .acm import ACMLoss
from .adv_feature import AdvFeatureLoss
from .base import DistillContext, KDLoss, LevelSpec
from .cwd import CWDLoss
from .fgd import FGDLoss
from .fkd import FKDLoss
from .l1 import L1Loss
from .l2 import L2Loss
from .mgd import MGDLoss
from .nad import NADLoss
from .pkd import PKDLoss
from .presets import preset_names, preset_values
from .registry import build_loss, loss_class, loss_names, register_loss
from .ssim import SSIMLoss

__all__ = [
    "ACMLoss",
    "AdvFeatureLoss",
    "CWDLoss",
    "DistillContext",
    "FGDLoss",
    "FKDLoss",
    "KDLoss",
    "L1Loss",
    "L2Loss",
    "LevelSpec",
    "MGDLoss",
    "NADLoss",
    "PKDLoss",
    "SSIMLoss",
    "build_loss",
    "loss_class",
    "loss_names",
    "preset_names",
    "preset_values",
    "register_loss",
]
