"""The operations, usable alone: ``from ikd_fast.kernels import pyramid_l2``. Each is imported on first use.

Pure torch for now, on any device; needs neither Triton nor a GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "FGDSums": "fgd",
    "Stream": "philox",
    "add_noise": "add_noise",
    "augment_batch": "augment_batch",
    "channel_kl": "channel_kl",
    "draw": "philox",
    "fgd_attention": "fgd",
    "fgd_context": "fgd",
    "fgd_masks": "fgd",
    "fgd_relation": "fgd",
    "fgd_sums": "fgd",
    "input_diversity": "input_diversity",
    "keyed_mask": "masked_l2",
    "mask_maps": "masked_l2",
    "normal": "philox",
    "philox4x32": "philox",
    "philox4x32_blocks": "philox",
    "pyramid_l1": "pyramid_l2",
    "pyramid_l2": "pyramid_l2",
    "stable_id": "philox",
    "uniform": "philox",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .reference.add_noise import add_noise as add_noise
    from .reference.augment_batch import augment_batch as augment_batch
    from .reference.channel_kl import channel_kl as channel_kl
    from .reference.fgd import FGDSums as FGDSums
    from .reference.fgd import fgd_attention as fgd_attention
    from .reference.fgd import fgd_context as fgd_context
    from .reference.fgd import fgd_masks as fgd_masks
    from .reference.fgd import fgd_relation as fgd_relation
    from .reference.fgd import fgd_sums as fgd_sums
    from .reference.input_diversity import input_diversity as input_diversity
    from .reference.masked_l2 import keyed_mask as keyed_mask
    from .reference.masked_l2 import mask_maps as mask_maps
    from .reference.philox import Stream as Stream
    from .reference.philox import draw as draw
    from .reference.philox import normal as normal
    from .reference.philox import philox4x32 as philox4x32
    from .reference.philox import philox4x32_blocks as philox4x32_blocks
    from .reference.philox import stable_id as stable_id
    from .reference.philox import uniform as uniform
    from .reference.pyramid_l2 import pyramid_l1 as pyramid_l1
    from .reference.pyramid_l2 import pyramid_l2 as pyramid_l2


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.reference.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
