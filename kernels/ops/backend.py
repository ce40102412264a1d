"""Which room computes: the reference on a CPU, Triton on CUDA; by name where the caller names one."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

import torch

BACKENDS = ("auto", "triton", "reference")
MIN_TRITON = (3, 6)


@functools.cache
def triton_problem() -> str | None:
    """Why Triton cannot be used here, or None. Looks at the installation only, never at a device."""
    try:
        import triton
    except Exception as error:
        return f"triton does not import ({error}); pip install 'triton>=3.6'"
    version = tuple(int(p) for p in triton.__version__.split(".")[:2])
    if version < MIN_TRITON:
        return f"expected triton >= 3.6, got {triton.__version__}; pip install -U 'triton>=3.6'"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for, which runs kernels on CPU tensors (slowly; for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def _warn_once(problem: str) -> None:
    warnings.warn(
        f"ikd_fast runs its reference (plain PyTorch) operations on the GPU: {problem}", stacklevel=4
    )


def check_backend(op: str, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")


def choose(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """``"triton"`` or ``"reference"`` for tensors of this device and dtype.

    float64 is computed by the reference, which alone keeps its precision. A backend asked for by name is
    used or refused, never replaced.

    >>> choose("pyramid_l2", "auto", torch.device("cpu"), torch.float32)
    'reference'
    """
    check_backend(op, backend)
    if backend == "reference":
        return backend
    if backend == "triton":
        if dtype == torch.float64:
            raise TypeError(f"{op}: expected fp16, bf16 or fp32 for backend='triton', got {dtype}")
        if problem := triton_problem():
            raise RuntimeError(f"{op}: backend='triton' was asked for, but {problem}")
        if device.type not in ("cuda", "meta") and not interpreted():
            raise RuntimeError(
                f"{op}: backend='triton' expects CUDA tensors, got tensors on {device}; "
                "TRITON_INTERPRET=1, set before Python starts, interprets kernels on a CPU"
            )
        return backend
    if device.type != "cuda" or dtype == torch.float64:
        return "reference"
    if problem := triton_problem():
        _warn_once(problem)
        return "reference"
    return "triton"


def room(stem: str, backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module that computes operation ``stem``; both rooms define the same functions."""
    folder = "triton_ops" if choose(stem, backend, device, dtype) == "triton" else "reference"
    return importlib.import_module(f"..{folder}.{stem}", __package__)
