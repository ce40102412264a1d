"""Record what launchers would launch, and compile exactly that for a GPU that is not there."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..triton_ops.launch import Launch, trace
from .ptx import Line, float_atomics, widest_accesses


@dataclass(frozen=True)
class Case:
    """One call of an operation on meta tensors; ``aligned``: its streaming accesses must be 16 bytes wide."""

    op: str
    name: str
    call: Callable[[], Any]
    aligned: bool = True

    def launches(self) -> list[Launch]:
        with trace(run=False) as record:
            self.call()
        if not record.launches:
            raise RuntimeError(f"{self.op} ({self.name}) launched no kernel")
        return record.launches


@dataclass
class Build:
    """One specialisation of a kernel for one target, and the cases that launch it."""

    kernel: str
    op: str
    target: str
    registers: int
    stack: int
    local: int
    shared: int
    widths: dict[Line, int]
    atomics: list[str]
    cases: list[str] = field(default_factory=list)
    aligned: bool = False


class _Driver:
    """What Triton asks a driver for while it compiles. Devices are numbered by their compute capability, since
    a kernel keeps one target for each device."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.capability = capability
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """Triton compiles for ``target`` ("sm_90") inside; the driver that was active, if any, is so again afterwards."""
    from triton.runtime.driver import driver

    before = driver._active
    driver.set_active(_Driver(int(target.removeprefix("sm_"))))
    try:
        yield
    finally:
        driver.set_active(before)


def _resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of the only kernel of a cubin, by the tool of Triton's own package."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout)}
    if missing := {"REG", "STACK", "LOCAL"} - set(found):
        raise RuntimeError(
            f"cuobjdump names no {', '.join(sorted(missing))}: {done.stdout!r} {done.stderr!r}"
        )
    return found


def _build(op: str, target: str, name: str, compiled: Any) -> Build:
    used, ptx = _resources(compiled.asm["cubin"]), compiled.asm["ptx"]
    return Build(
        name,
        op,
        target,
        registers=used["REG"],
        stack=used["STACK"],
        local=used["LOCAL"],
        shared=int(compiled.metadata.shared),
        widths=widest_accesses(ptx),
        atomics=float_atomics(ptx),
    )


def build(cases: Iterable[tuple[Case, list[Launch]]], target: str) -> list[Build]:
    """Every specialisation that the cases launch, compiled once."""
    found: dict[int, tuple[Any, Build]] = {}
    with compiling_for(target):
        for case, launches in cases:
            for launch in launches:
                compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta)
                # Triton hands out one object for every launch of the same specialisation.
                if id(compiled) not in found:
                    found[id(compiled)] = (compiled, _build(case.op, target, launch.name, compiled))
                entry = found[id(compiled)][1]
                if case.name not in entry.cases:
                    entry.cases.append(case.name)
                entry.aligned |= case.aligned
    return [entry for _, entry in found.values()]
