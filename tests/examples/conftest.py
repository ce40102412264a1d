"""The scripts of docs/examples as modules; they import each other by bare names, as when they are run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest


@pytest.fixture
def example(repo_root, monkeypatch) -> Iterator[Callable[[str], ModuleType]]:
    folder = repo_root / "docs" / "examples"
    monkeypatch.syspath_prepend(str(folder))
    names = {path.stem for path in folder.glob("*.py")}
    yield importlib.import_module
    for name in names & set(sys.modules):
        del sys.modules[name]
