"""Names of mmdet's registries, for the tests that have mmdet."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture(autouse=True)
def _mmdet_scope() -> None:
    """What a Runner does first: everything of mmdet registered, and names looked up there."""
    if importlib.util.find_spec("mmengine") is None:
        return
    import ikd_fast.mmdet  # noqa: F401, I001  (before anything imports mmdet)
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
