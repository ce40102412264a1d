"""Losses by name, so that a config can say ``dict(type="FGDLoss", preset="retinanet")``."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from .base import KDLoss

_LOSSES: dict[str, type[KDLoss]] = {}
C = TypeVar("C", bound=type[KDLoss])


def register_loss(cls: C) -> C:
    """Class decorator: make a ``KDLoss`` subclass known by its class name.

    >>> @register_loss
    ... class MeanGap(KDLoss):
    ...     default_name = "mean_gap"
    ...     def forward(self, student, teacher, ctx):
    ...         return sum((s.mean() - t.mean()).abs() for _, s, t in self.pairs(student, teacher))
    >>> build_loss(dict(type="MeanGap", levels=[0])).levels
    (0,)
    """
    if not (isinstance(cls, type) and issubclass(cls, KDLoss)):
        raise TypeError(f"register_loss expects a subclass of ikd_fast.losses.KDLoss, got {cls!r}")
    known = _LOSSES.get(cls.__name__)
    same = known is not None and (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
    if known is not None and not same:
        raise ValueError(
            f"a loss named {cls.__name__} is registered already, from {known.__module__}; give the one from "
            f"{cls.__module__} another name"
        )
    _LOSSES[cls.__name__] = cls
    return cls


def loss_names() -> list[str]:
    """The registered names, sorted."""
    return sorted(_LOSSES)


def loss_class(name: str) -> type[KDLoss]:
    """The class registered under ``name``."""
    if name not in _LOSSES:
        near = difflib.get_close_matches(name, _LOSSES, n=1, cutoff=0.6)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"unknown loss {name!r}; valid: {', '.join(loss_names())}.{hint} Register your own with "
            "@register_loss"
        )
    return _LOSSES[name]


def build_loss(cfg: Mapping[str, Any] | KDLoss) -> KDLoss:
    """A loss from ``dict(type=..., **arguments)``; a ready ``KDLoss`` is returned as it is.

    Raises ``ValueError`` for an unknown name and ``TypeError`` for an argument the loss does not take,
    listing the valid ones.
    """
    if isinstance(cfg, KDLoss):
        return cfg
    if not isinstance(cfg, Mapping) or "type" not in cfg:
        raise TypeError(
            "expected a KDLoss or a dict with 'type', e.g. dict(type='FGDLoss', preset='retinanet'); got "
            f"{cfg!r}"
        )
    arguments = {str(k): v for k, v in cfg.items() if k != "type"}
    kind = cfg["type"]
    if isinstance(kind, type) and issubclass(kind, KDLoss):
        cls: type[KDLoss] = kind
    elif isinstance(kind, str):
        cls = loss_class(kind)
    else:
        raise TypeError(
            f"type must be a registered name ({', '.join(loss_names())}) or a KDLoss subclass, got {kind!r}"
        )
    parameters = inspect.signature(cls).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        extra = sorted(set(arguments) - set(parameters))
        if extra:
            raise TypeError(
                f"{cls.__name__} takes no argument {', '.join(extra)}; valid: {', '.join(parameters)}"
            )
    return cls(**arguments)
