"""IKD for mmdet 3.x: ``custom_imports = dict(imports=['ikd_fast.mmdet'])`` registers everything by name.

Importing this package before mmdet makes mmdet usable without compiled mmcv operators (see :mod:`.compat`).
"""

from .compat import activate as _activate

_activate()

from .augment import AdaptiveFreqAugBatch, AdaptiveFreqAugTransform  # noqa: E402
from .distiller import IKDDistiller  # noqa: E402
from .hooks import IKDHook, install  # noqa: E402
from .kornia_augment import KorniaBatchAugment  # noqa: E402
from .preprocessor import IKDDetDataPreprocessor  # noqa: E402
from .registry import KD_LOSSES  # noqa: E402
from .resume import KeyedResumeHook  # noqa: E402
from .sampler import KeyedSampler  # noqa: E402
from .transforms import KeyedRandomCrop, KeyedRandomness, LoadAdversarialImage  # noqa: E402
from .victim import MMDetVictim  # noqa: E402

install()

__all__ = [
    "KD_LOSSES",
    "AdaptiveFreqAugBatch",
    "AdaptiveFreqAugTransform",
    "IKDDetDataPreprocessor",
    "IKDDistiller",
    "IKDHook",
    "KeyedRandomCrop",
    "KeyedRandomness",
    "KeyedResumeHook",
    "KeyedSampler",
    "KorniaBatchAugment",
    "LoadAdversarialImage",
    "MMDetVictim",
]
