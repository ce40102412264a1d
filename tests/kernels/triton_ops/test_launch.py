"""Buffers and traces: what the kernel tests rely on."""

from __future__ import annotations

import pytest
import torch

from ikd_fast.kernels.triton_ops.launch import INT32_MAX, empty, empty_like, launch, table, trace


def test_poison_fills_buffers_and_leaves_tables(poison, device) -> None:
    assert empty((2, 3), torch.bfloat16, device).isnan().all()
    like = torch.zeros(2, 3, 4, 5, dtype=torch.int32, device=device).to(memory_format=torch.channels_last)
    assert (empty_like(like) == INT32_MAX).all()
    assert empty_like(like).stride() == like.stride()
    assert table([1, 2], torch.int64, device).tolist() == [1, 2]


def test_buffers_are_counted_in_bytes(device) -> None:
    with trace() as record:
        empty((2, 3), torch.float16, device)
        empty_like(torch.zeros(7, device=device), dtype=torch.uint8)
        table([[1, 2, 3]], torch.int64, device)
    assert record.bytes == 12 + 7 + 24
    empty(5, torch.float32, device)
    assert record.bytes == 43


class _Recorder:
    """Looks like a jitted function, as far as ``launch`` goes."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.fn = lambda: None
        self.fn.__name__ = "recorder"

    def __getitem__(self, grid):
        return lambda *args, **meta: self.calls.append((grid, args, meta))


def test_launches_are_recorded_and_run_is_obeyed() -> None:
    kernel, device = _Recorder(), torch.device("cpu")
    with trace() as outer:
        launch(kernel, 3, device, "a", BLOCK=4)
        with trace(run=False) as inner:
            launch(kernel, (2, 5), device)
    launch(kernel, 7, device)
    assert outer.names == ["recorder", "recorder"]
    assert inner.names == ["recorder"]
    assert inner.launches[0].grid == (2, 5)
    assert kernel.calls == [((3,), ("a",), {"BLOCK": 4}), ((7,), (), {})]


def test_an_empty_grid_launches_nothing_and_a_huge_one_is_refused() -> None:
    kernel, device = _Recorder(), torch.device("cpu")
    with trace() as record:
        launch(kernel, (4, 0), device)
        with pytest.raises(
            ValueError, match=r"recorder: expected a grid below 2\*\*31 programs, got \(2147483648,\)"
        ):
            launch(kernel, 2**31, device)
    assert record.names == []
    assert kernel.calls == []
