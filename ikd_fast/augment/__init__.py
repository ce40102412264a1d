"""Sample-specific augmentation (eq. 4): a plan made on the CPU, executed where the images are."""

from .adaptive import AdaptiveFreqAug
from .plan import AugPlan, Branch

__all__ = ["AdaptiveFreqAug", "AugPlan", "Branch"]
