"""Records of CUDA tensors in host memory: the same bytes back, on any stream, and nothing waits."""

from __future__ import annotations

import pytest
import torch

from ikd_fast.attack.memory import HostStore, Record

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def record_of(seed: int, visits: int = 1) -> Record:
    g = torch.Generator("cuda").manual_seed(seed)
    delta = torch.randint(0, 256, (3 * 40 * 31,), generator=g, device="cuda", dtype=torch.uint8)
    return Record((40, 62), visits, seed, delta, torch.randn(3, 40, 62, generator=g, device="cuda").half())


def same(a: Record, b: Record) -> bool:
    return torch.equal(a.delta.cpu(), b.delta.cpu()) and torch.equal(a.velocity.cpu(), b.velocity.cpu())


def test_records_come_back_from_pinned_memory():
    store, device = HostStore(), torch.device("cuda")
    store.put(0, record_of(0))  # the first block of memory, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(50):
            store.put(i, record_of(i))
        for i in range(50):
            store.put(i, record_of(100 + i, visits=2))
        found = [store.get(i, device) for i in range(50)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert store._slots[0].delta.is_pinned()
    assert {record.delta.device.type for record in found} == {"cuda"}
    assert all(same(record, record_of(100 + i)) for i, record in enumerate(found))
    assert same(store.get(3, torch.device("cpu")), record_of(103))


def test_another_stream_sees_what_was_put():
    store, side, device = HostStore(), torch.cuda.Stream(), torch.device("cuda")
    for i in range(20):
        torch.cuda._sleep(2_000_000)  # the copy into host memory comes late
        store.put(1, record := record_of(i))
        with torch.cuda.stream(side):
            found = store.get(1, device)
        side.synchronize()
        assert same(found, record)
