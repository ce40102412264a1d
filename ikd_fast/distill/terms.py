"""Named, weighted addends of the loss, and the scalars that go to a log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def unique_names(losses: Iterable[Any]) -> list[str]:
    names: list[str] = []
    for loss in losses:
        name, k = loss.name, 1
        while name in names:
            name, k = f"{loss.name}_{k}", k + 1
        names.append(name)
    return names


def weighted(
    value: Tensor | Mapping[str, Tensor], weight: float, key: str, logs: dict[str, Tensor]
) -> Tensor:
    """Weighted sum of a loss's levels, each logged."""
    if isinstance(value, Tensor):
        return weight * value
    for level, term in value.items():
        logs[log_key(f"{key}.{level}")] = weight * term.detach()
    return weight * torch.stack(list(value.values())).sum()


def log_key(name: str) -> str:
    """Trainers sum what is called a loss; what is only logged must not be."""
    return name.removeprefix("task/").replace("loss_", "").replace("loss", "l")


def loss_and_maps(value: Any) -> tuple[Any, Any]:
    if not (isinstance(value, tuple) and len(value) == 2):
        raise TypeError(
            "features is a callable, so task_loss must return (loss, maps): the student's clean forward is run once; "
            f"got {type(value).__name__}"
        )
    return value


def task_terms(value: Any) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        value = {"task": value}
    if not isinstance(value, Mapping) or not value:
        raise TypeError(
            f"task_loss must return a scalar Tensor or a dict of scalars, got {type(value).__name__}"
        )
    terms = {}
    for name, term in value.items():
        if not isinstance(term, Tensor) or term.dim() != 0:
            got = list(term.shape) if isinstance(term, Tensor) else type(term).__name__
            raise TypeError(f"task_loss[{name!r}] must be a scalar Tensor, got {got}")
        terms[f"task/{name}"] = term
    return terms
