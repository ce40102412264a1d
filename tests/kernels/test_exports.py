"""``ikd_fast.kernels`` alone: every name it lists is there, and importing it loads nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ikd_fast.kernels as kernels


def test_every_listed_name_is_there() -> None:
    assert kernels.__all__ == sorted(set(kernels.__all__))
    for name in kernels.__all__:
        value = getattr(kernels, name)
        assert callable(value)
        assert value.__module__.startswith(("ikd_fast.kernels.ops.", "ikd_fast.kernels.reference.")), name
        assert value.__name__ == name


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(AttributeError, match="no attribute 'piramid_l2'; it has .*pyramid_l2"):
        kernels.piramid_l2  # noqa: B018


def test_import_loads_neither_torch_nor_triton() -> None:
    code = (
        "import sys, ikd_fast.kernels; print([m for m in ('torch', 'numpy', 'triton') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
