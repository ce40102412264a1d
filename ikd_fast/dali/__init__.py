"""NVIDIA DALI as a loader: decoding, resizing, cropping and mirroring off the training loop, in our keyed order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .coco import CocoImages
    from .errors import BadImage
    from .loader import DALIDetLoader
    from .require import package, require_dali
    from .sampler import KeyedShardSampler

__all__ = ["BadImage", "CocoImages", "DALIDetLoader", "KeyedShardSampler", "package", "require_dali"]
_HOMES = {
    "BadImage": "errors",
    "CocoImages": "coco",
    "DALIDetLoader": "loader",
    "KeyedShardSampler": "sampler",
    "package": "require",
    "require_dali": "require",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
