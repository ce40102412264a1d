"""How every kernel is started and every buffer allocated, so that both can be counted and compiled ahead of time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the jitted function, its grid, arguments and compile-time options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


@dataclass
class Trace:
    """What launchers did while :func:`trace` was active: launches in order, and bytes allocated."""

    run: bool = True
    launches: list[Launch] = field(default_factory=list)
    bytes: int = 0

    @property
    def names(self) -> list[str]:
        return [launch.name for launch in self.launches]


_traces: list[Trace] = []


@contextlib.contextmanager
def trace(*, run: bool = True) -> Iterator[Trace]:
    """Record the launches and allocations of the launchers; ``run=False`` records without launching.

    With ``run=False`` meta tensors will do, which is how kernels are compiled without a GPU.
    """
    record = Trace(run)
    _traces.append(record)
    try:
        yield record
    finally:
        _traces.remove(record)


def launch(kernel: Any, grid: int | tuple[int, ...], device: torch.device, *args: Any, **meta: Any) -> None:
    """Start ``kernel`` on ``device``; a grid of nothing launches nothing."""
    grid = (grid,) if isinstance(grid, int) else grid
    if 0 in grid:
        return
    if max(grid) > INT32_MAX:
        raise ValueError(f"{kernel.fn.__name__}: expected a grid below 2**31 programs, got {grid}")
    if _traces:
        for record in _traces:
            record.launches.append(Launch(kernel, grid, args, meta))
        if not all(record.run for record in _traces):
            return
    if device.type == "meta":
        raise RuntimeError(
            f"{kernel.fn.__name__}: expected CUDA tensors, got meta tensors, which can only be traced"
        )
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


def _count(x: Tensor) -> Tensor:
    for record in _traces:
        record.bytes += x.untyped_storage().nbytes()
    return x


def empty(shape: int | Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous buffer."""
    return _count(torch.empty(shape, dtype=dtype, device=device))


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised buffer with the strides of ``x`` where it is dense, else contiguous."""
    return _count(torch.empty_like(x, dtype=dtype))


def table(rows: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host numbers on the device by one asynchronous copy: never a sync."""
    return upload(torch.tensor(rows, dtype=dtype, device="cpu"), device)


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, likewise; on the CPU itself."""
    if device.type == "cpu":
        return _count(host)
    if device.type == "cuda":
        host = host.pin_memory()
    return _count(host.to(device, non_blocking=True))


def check_index_space(op: str, what: str, count: int, chunk: int = 1) -> None:
    """Offsets inside one image, rounded up to a program's chunk, are 32-bit; images are reached by 64-bit ones."""
    if -(-count // chunk) * chunk > INT32_MAX:
        raise ValueError(f"{op}: {what} has {count} elements; expected fewer than 2**31 an image")
