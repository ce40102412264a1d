"""Where records are kept: the interface of a backend, and host memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .record import Record

ALIGN = 64
FIRST_SLAB, SLAB = 1 << 20, 1 << 28
"""Bytes of the first block of host memory and of the largest. Powers of two: torch's allocator of pinned memory hands out nothing
else, so records pinned one by one would take up to twice their size."""


@runtime_checkable
class Store(Protocol):
    """A backend of :class:`~ikd_fast.attack.memory.PerturbationMemory`.

    ``settings`` says what the records were made with (None: nothing kept yet); the memory sets it once and compares it ever after.
    ``get`` returns None for what it does not hold, and for a record it cannot read; ``put`` replaces a record whole.
    """

    settings: Mapping[str, Any] | None

    def get(self, id: int, device: torch.device) -> Record | None: ...

    def put(self, id: int, record: Record) -> None: ...

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def close(self) -> None: ...


@dataclass
class _Slot:
    size: tuple[int, int]
    visits: int
    step: int
    delta: Tensor
    velocity: Tensor | None
    used: Any = None
    """CUDA event of the last copy from or into the slot, while it may still run."""


class HostStore:
    """Records in this process's memory: gone when it ends.

    Records of CUDA tensors go to pinned memory and come from there by copies that run on the caller's stream; nothing waits for
    them on the host but a ``get`` to the CPU. Records are copied on the way in and on the way out, never shared. Memory is taken in
    blocks that grow from 1 MiB to 256 MiB; taking a pinned block is the one call that may wait for the device. A deep copy and what is
    pickled hold no records.
    """

    def __init__(self) -> None:
        self.settings: Mapping[str, Any] | None = None
        self._slots: dict[int, _Slot] = {}
        self._free: dict[int, list[Tensor]] = {}
        self._slab: Tensor | None = None
        self._next, self._grow = 0, FIRST_SLAB
        self._nbytes = self._reserved = 0
        self._running: deque[_Slot] = deque()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, id: int) -> bool:
        return id in self._slots

    @property
    def nbytes(self) -> int:
        """Bytes of the records."""
        return self._nbytes

    @property
    def reserved(self) -> int:
        """Bytes of host memory taken for them."""
        return self._reserved

    def get(self, id: int, device: torch.device) -> Record | None:
        slot = self._slots.get(id)
        if slot is None:
            return None
        self._wait(slot, device)
        delta = slot.delta.to(device, non_blocking=True, copy=True)
        velocity = None if slot.velocity is None else slot.velocity.to(device, non_blocking=True, copy=True)
        self._mark(slot, device)
        return Record(slot.size, slot.visits, slot.step, delta, velocity)

    def put(self, id: int, record: Record) -> None:
        device = record.delta.device
        slot = self._slots.get(id)
        if slot is None or not _fits(slot, record):
            if slot is not None:
                self._drop(id)
            slot = self._slots[id] = self._new(record)
            self._nbytes += record.nbytes
        self._wait(slot, device)
        slot.delta.copy_(record.delta.detach(), non_blocking=True)
        if slot.velocity is not None and record.velocity is not None:
            slot.velocity.copy_(record.velocity.detach(), non_blocking=True)
        slot.size, slot.visits, slot.step = record.size, record.visits, record.step
        self._mark(slot, device)

    def close(self) -> None:
        """Forget every record and give the memory back."""
        for slot in self._slots.values():
            if slot.used is not None:
                slot.used.synchronize()
        self.__init__()  # type: ignore[misc]

    def __deepcopy__(self, memo: dict) -> HostStore:
        """Of a copied model (an EMA, a snapshot): a store of its own, empty, for the same settings."""
        twin = HostStore()
        twin.settings = self.settings
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (self.settings,)

    def _new(self, record: Record) -> _Slot:
        pinned = record.delta.device.type == "cuda"
        velocity = None
        delta = self._take(record.delta.numel(), pinned)
        if record.velocity is not None:
            raw = self._take(record.velocity.numel() * 2, pinned)
            velocity = raw.view(torch.float16).view(record.velocity.shape)
        return _Slot(record.size, record.visits, record.step, delta, velocity)

    def _take(self, nbytes: int, pinned: bool) -> Tensor:
        free = self._free.get(nbytes)
        if free:
            return free.pop()
        if self._slab is None or self._next + nbytes > self._slab.numel():
            length = self._grow
            while length < nbytes:
                length *= 2
            self._slab = torch.empty(length, dtype=torch.uint8, pin_memory=pinned)
            self._next, self._grow = 0, min(2 * self._grow, SLAB)
            self._reserved += length
        piece = self._slab[self._next : self._next + nbytes]
        self._next += -(-nbytes // ALIGN) * ALIGN
        return piece

    def _drop(self, id: int) -> None:
        slot = self._slots.pop(id)
        if slot.used is not None:
            slot.used.synchronize()
        self._free.setdefault(slot.delta.numel(), []).append(slot.delta)
        self._nbytes -= slot.delta.numel()
        if slot.velocity is not None:
            raw = slot.velocity.view(-1).view(torch.uint8)
            self._free.setdefault(raw.numel(), []).append(raw)
            self._nbytes -= raw.numel()

    def _wait(self, slot: _Slot, device: torch.device) -> None:
        if slot.used is None:
            return
        if device.type == "cuda":
            torch.cuda.current_stream(device).wait_event(slot.used)
        else:
            slot.used.synchronize()

    def _mark(self, slot: _Slot, device: torch.device) -> None:
        if device.type != "cuda":
            return
        slot.used = torch.cuda.Event()
        slot.used.record(torch.cuda.current_stream(device))
        self._running.append(slot)
        while self._running and (self._running[0].used is None or self._running[0].used.query()):
            self._running.popleft().used = None


def _fits(slot: _Slot, record: Record) -> bool:
    same = slot.delta.numel() == record.delta.numel()
    if slot.velocity is None or record.velocity is None:
        return same and slot.velocity is None and record.velocity is None
    return same and slot.velocity.shape == record.velocity.shape


def _empty(settings: Mapping[str, Any] | None) -> HostStore:
    store = HostStore()
    store.settings = settings
    return store
