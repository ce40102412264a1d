"""Distillation losses: one object for the whole pyramid, its weights inside, built by name or by class."""

from .adv_feature import AdvFeatureLoss
from .base import DistillContext, KDLoss, LevelSpec
from .fgd import FGDLoss
from .mgd import MGDLoss
from .presets import preset_names, preset_values
from .registry import build_loss, loss_class, loss_names, register_loss

__all__ = [
    "AdvFeatureLoss",
    "DistillContext",
    "FGDLoss",
    "KDLoss",
    "LevelSpec",
    "MGDLoss",
    "build_loss",
    "loss_class",
    "loss_names",
    "preset_names",
    "preset_values",
    "register_loss",
]
