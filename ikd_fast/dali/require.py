"""DALI, or an error that says which of its packages to install."""

from __future__ import annotations

from types import ModuleType

import torch


def package() -> str:
    """The pip package of DALI for the CUDA version torch was built with; a CPU build takes either.

    >>> package() in ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
    True
    """
    major = (torch.version.cuda or "12").partition(".")[0]
    return "nvidia-dali-cuda130" if int(major) >= 13 else "nvidia-dali-cuda120"


def require_dali() -> ModuleType:
    """``nvidia.dali``.

    Raises:
        ImportError: it is not installed or does not load; names the package for the CUDA version found.
    """
    try:
        import nvidia.dali as dali
    except ImportError as error:
        cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA (DALI's CPU path works)"
        raise ImportError(
            f"ikd_fast.dali needs NVIDIA DALI >= 2.0, Linux only ({error}); torch has {cuda}: pip install {package()}"
        ) from error
    return dali
