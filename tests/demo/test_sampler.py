"""ChunkSampler: epochs are stretches of one keyed sequence of passes."""

from __future__ import annotations

import pytest

from ikd_fast.demo.sampler import ChunkSampler


def epochs(sampler: ChunkSampler, count: int) -> list[list[int]]:
    rows = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        rows.append(list(sampler))
    return rows


def test_every_image_comes_once_a_pass() -> None:
    rows = epochs(ChunkSampler(range(12), chunk=5, seed=3), 12)
    assert [len(row) for row in rows] == [5] * 12
    sequence = [i for row in rows for i in row]
    for start in range(0, 60, 12):
        assert sorted(sequence[start : start + 12]) == list(range(12))
    assert sequence[:12] != sequence[12:24]


def test_an_epoch_depends_on_seed_and_number_alone() -> None:
    first = epochs(ChunkSampler(range(40), chunk=16, seed=0), 4)
    resumed = ChunkSampler(range(40), chunk=16, seed=0)
    resumed.set_epoch(3)
    assert list(resumed) == first[3]
    assert epochs(ChunkSampler(range(40), chunk=16, seed=1), 4) != first


def test_processes_share_a_chunk() -> None:
    whole = ChunkSampler(range(40), chunk=15, seed=0)
    parts = []
    for rank in range(2):
        part = ChunkSampler(range(40), chunk=15, seed=0)
        part.rank, part.world = rank, 2
        assert len(part) == len(list(part))
        parts.append(list(part))
    assert [i for pair in zip(*parts, strict=False) for i in pair] + parts[0][len(parts[1]) :] == list(whole)


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        ChunkSampler([], chunk=4)
