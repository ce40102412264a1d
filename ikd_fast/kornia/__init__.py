"""kornia: ``AdaptiveFreqAug`` in its manner, and its augmentations with keyed draws. Needs ``kornia>=0.9``.

>>> from ikd_fast.kornia import AdaptiveFreqAugmentation, KeyedSequential
"""

try:
    import kornia as _kornia
except ModuleNotFoundError as error:
    if error.name != "kornia":
        raise
    raise ModuleNotFoundError(
        "ikd_fast.kornia needs kornia >= 0.9, which is not installed; write pip install 'ikd_fast[kornia]' (Python >= 3.11)",
        name="kornia",
    ) from None

if tuple(int(v) for v in _kornia.__version__.split(".")[:2]) < (0, 9):
    raise ImportError(
        f"ikd_fast.kornia needs kornia >= 0.9, found {_kornia.__version__}, where boxes do not follow the padding of RandomCrop; "
        "write pip install -U kornia (Python >= 3.11)"
    )

from .adaptive import AdaptiveFreqAugmentation
from .build import build_augmentations
from .sequential import Augmented, KeyedSequential

__all__ = ["AdaptiveFreqAugmentation", "Augmented", "KeyedSequential", "build_augmentations"]
