"""The order in plain PyTorch: every image once, shards, and batches that start anywhere."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ikd_fast.dali import KeyedShardSampler
from ikd_fast.order import KeyedIndex, image_key, keyed_order, slotted_order


class Indices(Dataset):
    """Gives the index and the epoch it was drawn for."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[int, int]:
        return int(index), index.epoch


def shards(size: int, count: int, **options) -> list[KeyedShardSampler]:
    return [KeyedShardSampler(range(size), 3, shard_id=i, num_shards=count, **options) for i in range(count)]


def flat(sampler: KeyedShardSampler) -> list[int]:
    return [int(i) for batch in sampler for i in batch]


def test_orders_are_permutations_that_differ() -> None:
    orders = {tuple(keyed_order(20, e, s).tolist()) for e in range(4) for s in (0, 1, 2**64 - 1)}
    assert len(orders) == 12
    assert all(sorted(order) == list(range(20)) for order in orders)


def test_slotted_order_by_hand() -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    # Slot 0 has 3 and 1, slot 1 has 0, 4 and 2: the shorter row begins again.
    assert slotted_order(order, torch.tensor([1, 0, 1, 0, 1]), 2).tolist() == [3, 0, 1, 4, 3, 2]


def test_keys_tell_folders_ids_and_files_apart() -> None:
    keys = {image_key(path, i) for path in ("a/1.jpg", "b/1.jpg", "a/2.jpg", None) for i in (1, 2, "1x")}
    assert len(keys) == 12
    assert image_key("/x/y/a/1.jpg", 1) == image_key("a/1.jpg", 1)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("size", "count"), [(10, 1), (10, 2), (10, 3), (7, 7), (3, 5)])
def test_shards_are_disjoint_and_complete(size: int, count: int, shuffle: bool) -> None:
    parts = shards(size, count, shuffle=shuffle, seed=4)
    for epoch in range(3):
        for part in parts:
            part.set_epoch(epoch)
        lists = [flat(part) for part in parts]
        assert sorted(i for part in lists for i in part) == list(range(size))
        assert max(map(len, lists)) - min(map(len, lists)) <= 1
        assert [len(part) for part in parts] == [-(-len(x) // 3) for x in lists]
        whole = KeyedShardSampler(range(size), shuffle=shuffle, seed=4)
        whole.set_epoch(epoch)
        assert flat(whole)[::count] == lists[0]


@pytest.mark.parametrize(("size", "count"), [(10, 2), (10, 3), (3, 5), (2, 7), (1, 4)])
def test_even_shards_are_filled_up_from_the_beginning(size: int, count: int) -> None:
    lists = [flat(part) for part in shards(size, count, even=True)]
    assert {len(x) for x in lists} == {-(-size // count)}
    merged = [i for row in zip(*lists, strict=True) for i in row]
    order = flat(KeyedShardSampler(range(size)))
    assert merged == (order * count)[: len(merged)]


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_drop_last_leaves_out_a_batch_with_fewer(count: int, even: bool) -> None:
    for part, whole in zip(
        shards(11, count, drop_last=True, even=even), shards(11, count, even=even), strict=True
    ):
        batches = list(part)
        assert {len(b) for b in batches} <= {3}
        assert len(batches) == len(part) == len(flat(whole)) // 3
        assert batches == list(whole)[: len(batches)]


def test_indices_say_their_epoch_and_seed() -> None:
    sampler = KeyedShardSampler(range(4), 2, seed=9)
    sampler.set_epoch(3)
    batches = pickle.loads(pickle.dumps(list(sampler)))
    assert all(isinstance(i, KeyedIndex) and (i.epoch, i.seed) == (3, 9) for b in batches for i in b)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_goes_on_with_the_next_batch(workers: int) -> None:
    """torch's loader with workers asks for an iterator twice and uses the second one."""
    sampler = KeyedShardSampler(Indices(), 3, seed=2)
    loader = DataLoader(Indices(), batch_sampler=sampler, num_workers=workers, collate_fn=list)
    sampler.set_epoch(5)
    whole = list(loader)
    assert sorted(i for batch in whole for i, _ in batch) == list(range(11))
    assert {epoch for batch in whole for _, epoch in batch} == {5}
    for done in (1, 3, 4):
        sampler.start_at(done)
        rest = iter(loader)
        sampler.set_epoch(6)
        assert list(rest) == whole[done:]
        sampler.set_epoch(5)
        assert list(loader) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dataset=[]), "the data set is empty"),
        (dict(batch_size=0), "batch_size >= 1"),
        (dict(num_shards=0), "expected batch_size >= 1 and 0 <= shard_id < num_shards, got 1, 0, 0"),
        (dict(shard_id=2, num_shards=2), "got 1, 2, 2"),
        (dict(shard_id=-1), "shard_id must be a whole number >= 0, got -1"),
        (dict(batch_size="4"), "batch_size must be a whole number >= 0, got '4'"),
        (dict(seed=-1), "seed must be a whole number >= 0, got -1"),
    ],
)
def test_numbers_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyedShardSampler(**{"dataset": range(5), **options})


def test_an_epoch_before_the_beginning() -> None:
    with pytest.raises(ValueError, match="set_epoch expects epoch >= 0, got -1"):
        KeyedShardSampler(range(5)).set_epoch(-1)


def test_a_start_before_the_beginning() -> None:
    with pytest.raises(ValueError, match="start_at expects batches >= 0, got -1"):
        KeyedShardSampler(range(5)).start_at(-1)
