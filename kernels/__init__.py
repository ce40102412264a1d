"""The operations, usable alone: ``from ikd_fast.kernels import pyramid_l2``. Each is imported on first use.

Plain PyTorch on a CPU, Triton kernels on CUDA; importing this needs neither Triton nor a GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "AttentionStats": "ops.attention_stats",
    "CellMap": "reference.delta_codes",
    "DeltaCodes": "reference.delta_codes",
    "FGDSums": "ops.fgd",
    "Stream": "reference.philox",
    "add_noise": "ops.add_noise",
    "apply_delta": "ops.apply_delta",
    "attention_stats": "ops.attention_stats",
    "augment_batch": "ops.augment_batch",
    "channel_kl": "ops.channel_kl",
    "draw": "reference.philox",
    "fgd_attention": "reference.fgd",
    "fgd_context": "reference.fgd",
    "fgd_masks": "reference.fgd_masks",
    "fgd_relation": "ops.fgd",
    "fgd_sums": "ops.fgd",
    "fgsm_step_packed": "ops.fgsm_step",
    "input_diversity": "ops.input_diversity",
    "keyed_mask": "reference.masked_l2",
    "mask_maps": "ops.masked_l2",
    "normal": "reference.philox",
    "pearson": "ops.pearson",
    "philox4x32": "reference.philox",
    "philox4x32_blocks": "reference.philox",
    "pyramid_l1": "ops.pyramid_l2",
    "pyramid_l2": "ops.pyramid_l2",
    "sign_step": "ops.sign_step",
    "ssim": "ops.ssim",
    "stable_id": "reference.philox",
    "uniform": "reference.philox",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .ops.add_noise import add_noise as add_noise
    from .ops.apply_delta import apply_delta as apply_delta
    from .ops.attention_stats import AttentionStats as AttentionStats
    from .ops.attention_stats import attention_stats as attention_stats
    from .ops.augment_batch import augment_batch as augment_batch
    from .ops.channel_kl import channel_kl as channel_kl
    from .ops.fgd import FGDSums as FGDSums
    from .ops.fgd import fgd_relation as fgd_relation
    from .ops.fgd import fgd_sums as fgd_sums
    from .ops.fgsm_step import fgsm_step_packed as fgsm_step_packed
    from .ops.input_diversity import input_diversity as input_diversity
    from .ops.masked_l2 import mask_maps as mask_maps
    from .ops.pearson import pearson as pearson
    from .ops.pyramid_l2 import pyramid_l1 as pyramid_l1
    from .ops.pyramid_l2 import pyramid_l2 as pyramid_l2
    from .ops.sign_step import sign_step as sign_step
    from .ops.ssim import ssim as ssim
    from .reference.delta_codes import CellMap as CellMap
    from .reference.delta_codes import DeltaCodes as DeltaCodes
    from .reference.fgd import fgd_attention as fgd_attention
    from .reference.fgd import fgd_context as fgd_context
    from .reference.fgd_masks import fgd_masks as fgd_masks
    from .reference.masked_l2 import keyed_mask as keyed_mask
    from .reference.philox import Stream as Stream
    from .reference.philox import draw as draw
    from .reference.philox import normal as normal
    from .reference.philox import philox4x32 as philox4x32
    from .reference.philox import philox4x32_blocks as philox4x32_blocks
    from .reference.philox import stable_id as stable_id
    from .reference.philox import uniform as uniform


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
