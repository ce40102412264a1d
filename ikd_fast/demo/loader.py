"""Which loader the trainings read their images with; DALI's absence is said before anything else is done."""

from __future__ import annotations

import difflib
from typing import Any

from ikd_fast.demo.errors import DemoError

LOADERS = {"torch": "torch's DataLoader", "dali": "DALIDetLoader"}
"""Choices of ``--loader``, each with what it is."""


def check_loader(name: str) -> None:
    """Raise unless ``name`` is one of :data:`LOADERS` and its packages are here.

    >>> check_loader("torch")
    >>> check_loader("dalli")
    Traceback (most recent call last):
        ...
    ikd_fast.demo.errors.DemoError: --loader must be 'torch' or 'dali', got 'dalli'. Did you mean 'dali'?
    """
    if name not in LOADERS:
        near = difflib.get_close_matches(name, LOADERS, n=1)
        hint = f". Did you mean {near[0]!r}?" if near else ""
        raise DemoError(f"--loader must be {' or '.join(map(repr, LOADERS))}, got {name!r}{hint}", usage=True)
    if name == "dali":
        from ikd_fast.dali import require_dali

        try:
            require_dali()
        except ImportError as error:
            raise DemoError(f"--loader dali: {error}", usage=True) from None


def set_loader(cfg: Any, name: str) -> None:
    """Let a training config read its images with ``name``; device, threads and prefetch are the loader's defaults."""
    if name == "dali":
        from ikd_fast.mmdet.dali.build import TYPE

        cfg.train_dataloader.type = TYPE
