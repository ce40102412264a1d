"""Runs mmdet where mmcv has no compiled operators, and loads its checkpoints on torch >= 2.6.

Call :func:`activate` before mmdet is imported; ``import ikd_fast.mmdet`` and ``python -m ikd_fast.mmdet`` do so.
"""

from __future__ import annotations

from .activation import CompatReport, activate
from .checkpoints import UnsafeCheckpointError, load_checkpoint
from .environment import CompatError
from .operators import OperatorNotAvailable

__all__ = [
    "CompatError",
    "CompatReport",
    "OperatorNotAvailable",
    "UnsafeCheckpointError",
    "activate",
    "load_checkpoint",
]
