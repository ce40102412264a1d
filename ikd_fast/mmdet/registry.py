"""``KD_LOSSES``: the library's losses (and a user's own) as an mmengine registry, scope ``ikd_fast``."""

from __future__ import annotations

from typing import Any

from ikd_fast.losses.base import KDLoss
from ikd_fast.losses.registry import build_loss, loss_class, loss_names

from mmdet.registry import MODELS
from mmengine.registry import Registry


def _build(cfg: dict, registry: Registry, *args: Any, **kwargs: Any) -> KDLoss:
    """A loss registered here wins; every other name is the library's, with its list of valid ones in the error."""
    cfg = {key: value for key, value in cfg.items() if key != "_scope_"}
    kind = cfg.get("type")
    if isinstance(kind, str):
        found = registry.module_dict.get(kind.removeprefix("ikd_fast."))
        cfg["type"] = found or kind.removeprefix("ikd_fast.")
    return build_loss(cfg)


KD_LOSSES = Registry(
    "kd_loss", build_func=_build, parent=MODELS, scope="ikd_fast", locations=["ikd_fast.losses"]
)

for _name in loss_names():
    KD_LOSSES.register_module(name=_name, module=loss_class(_name))
