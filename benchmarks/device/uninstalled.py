"""Imported before anything of the library: ``ikd_fast.kernels`` resolves in a checkout that was never installed.

An install maps the top-level folders ``kernels/`` and ``configs/`` into the package; a bare machine without a package
index runs from the checkout. Also a pytest plugin: ``-p benchmarks.device.uninstalled``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import ikd_fast

ROOT = Path(__file__).resolve().parents[2]

if importlib.util.find_spec("ikd_fast.kernels") is None:
    ikd_fast.__path__.append(str(ROOT))
