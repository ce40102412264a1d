"""Every `>>>` example of the public docstrings runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import ikd_fast
import ikd_fast.kernels
from ikd_fast.losses import registry


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an example registers is gone with it."""
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))


def _modules() -> Iterator[str]:
    # kernels lies in another folder, so that a walk of ikd_fast alone does not reach it
    for package in (ikd_fast, ikd_fast.kernels):
        yield package.__name__
        for info in pkgutil.walk_packages(
            package.__path__, f"{package.__name__}.", onerror=lambda name: None
        ):
            if not info.name.endswith("__main__"):
                yield info.name


@pytest.mark.parametrize("name", sorted(set(_modules())))
def test_examples(name: str) -> None:
    if name.startswith("ikd_fast.kornia"):
        pytest.importorskip("kornia", reason="needs kornia >= 0.9, which needs Python 3.11")
    result = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0


def test_an_examples_registration_does_not_stay() -> None:
    assert "MeanGap" not in registry._LOSSES
    doctest.testmod(registry)
    assert "MeanGap" in registry._LOSSES


def test_there_are_examples() -> None:
    names = ("ikd_fast.losses.base", "ikd_fast.kernels.reference.philox")
    assert all(doctest.testmod(importlib.import_module(name)).attempted > 0 for name in names)
