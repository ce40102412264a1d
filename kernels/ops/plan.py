"""Checks of the plan numbers that ``augment_batch`` and ``add_noise`` take: small tensors on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.add_noise import RNGS
from ..reference.philox import _key_words
from .backend import check_backend

MAX_IMAGES = 65535  # the second axis of a grid


def check_rng(op: str, rng: str, backend: str) -> str:
    """The backend that can draw by ``rng``: torch's generator is the reference's alone."""
    check_backend(op, backend)
    if rng not in RNGS:
        raise ValueError(f"{op}: rng must be one of {', '.join(map(repr, RNGS))}, got {rng!r}")
    if rng == "torch" and backend == "triton":
        raise ValueError(f"{op}: backend='triton' draws by rng='philox', got rng='torch'")
    return "reference" if rng == "torch" else backend


def check_tensors(op: str, n: int, **tensors: tuple[Tensor, tuple[int, ...], torch.dtype]) -> None:
    """Shape, dtype, and on the CPU: looking at them must not wait for a device."""
    if n > MAX_IMAGES:
        raise ValueError(f"{op}: expected at most {MAX_IMAGES} images, got {n}")
    for name, (value, shape, dtype) in tensors.items():
        if tuple(value.shape) != shape or value.dtype != dtype or value.device.type != "cpu":
            got = f"{value.dtype} {list(value.shape)} on {value.device}"
            raise ValueError(
                f"{op}: {name}: expected {dtype} {list(shape)} on the CPU for {n} images, got {got}"
            )


def check_sigma(op: str, sigma: Sequence[float]) -> None:
    for i, value in enumerate(sigma):
        if not 0 <= value < math.inf:
            raise ValueError(f"{op}: sigma[{i}]: expected a finite number >= 0 of grey levels, got {value}")


def signed(seed: int) -> int:
    """A seed of 0..2**64-1 as the int64 that a schema holds."""
    _key_words(seed, 0, 0, 0)  # says what a seed must be
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def unsigned(seed: int, epoch: int) -> int:
    """The seed again, checked together with the epoch."""
    seed %= 1 << 64
    _key_words(seed, 0, epoch, 0)
    return seed
