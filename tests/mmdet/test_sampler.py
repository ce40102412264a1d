"""KeyedSampler: its order, its shards, and batches that start anywhere."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

from ikd_fast.kernels.reference.philox import Stream, philox4x32
from ikd_fast.mmdet import KeyedSampler, sampler
from ikd_fast.mmdet.sampler import KeyedBatches, KeyedIndex, attach


def on_rank(monkeypatch, rank, world, *args, **kwargs):
    monkeypatch.setattr(sampler, "get_dist_info", lambda: (rank, world))
    return KeyedSampler(*args, **kwargs)


@pytest.mark.parametrize(("size", "epoch", "seed"), [(1, 0, 0), (7, 3, 11), (64, 2**32 - 1, 2**64 - 1)])
def test_the_order_sorts_64_bits_of_philox(size, epoch, seed):
    """Recomputed with the generator on Python integers."""

    def bits(i):
        words = philox4x32((i // 2, 0, int(Stream.ORDER), epoch), (seed & 0xFFFFFFFF, seed >> 32))
        high, low = words[2 * (i % 2) : 2 * (i % 2) + 2]
        value = high << 32 | low
        return value - (1 << 64) if value >> 63 else value

    assert sampler.keyed_order(size, epoch, seed).tolist() == sorted(range(size), key=bits)


def test_orders_are_uniform():
    """Over 3,000 epochs image i is at place k with a share of 1/5; chi-squared of 25 cells, 16 degrees of freedom."""
    counts = np.zeros((5, 5))
    for epoch in range(3000):
        for place, i in enumerate(sampler.keyed_order(5, epoch, 0).tolist()):
            counts[place, i] += 1
    assert ((counts - 600) ** 2 / 600).sum() < 40  # P = 0.0008; the draws are fixed


@pytest.mark.parametrize("world", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("shuffle", [True, False])
def test_shards_have_every_image_once_and_are_filled_up_from_the_beginning(monkeypatch, world, shuffle):
    whole = list(on_rank(monkeypatch, 0, 1, range(10), shuffle=shuffle, seed=3))
    shards = [on_rank(monkeypatch, r, world, range(10), shuffle=shuffle, seed=3) for r in range(world)]
    lists = [list(shard) for shard in shards]
    assert {len(x) for x in lists} == {len(shards[0])} == {-(-10 // world)}
    merged = [i for row in zip(*lists, strict=True) for i in row]
    assert merged[:10] == whole
    assert merged[10:] == (whole * 2)[: len(merged) - 10]
    assert (whole == list(range(10))) is not shuffle


def test_an_infinite_sampler_goes_pass_after_pass_over_all_ranks(monkeypatch):
    shards = [iter(on_rank(monkeypatch, r, 3, range(10), seed=3, infinite=True)) for r in range(3)]
    merged = [next(shards[k % 3]) for k in range(40)]
    for epoch in range(4):
        part = merged[10 * epoch : 10 * epoch + 10]
        assert sorted(part) == list(range(10))
        assert {i.epoch for i in part} == {epoch}
        assert part == sampler.keyed_order(10, epoch, 3).tolist()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", [12, 22, 24])
def test_with_slots_an_image_stays_on_its_rank(monkeypatch, size, shuffle):
    """Six slots on 1, 2, 3 and 6 ranks: one order for all, every image once and at most 5 twice, ranks as equal as may be."""
    orders = set()
    for world in (1, 2, 3, 6):
        shards = [
            on_rank(monkeypatch, r, world, range(size), shuffle=shuffle, seed=3, slots=6)
            for r in range(world)
        ]
        owner: dict[int, set[int]] = {}
        for epoch in range(4):
            lists = []
            for rank, shard in enumerate(shards):
                shard.set_epoch(epoch)
                mine = list(shard)
                assert len(mine) == len(shard) == -(-size // 6) * 6 // world
                assert {i.epoch for i in mine} == {epoch}
                lists.append(mine)
                for i in mine:
                    owner.setdefault(int(i), set()).add(rank)
            whole = [i for row in zip(*lists, strict=True) for i in row]
            assert set(whole) == set(range(size))
            assert len(whole) - size == -size % 6
            orders.add((epoch, tuple(whole)))
        assert all(len(ranks) == 1 for ranks in owner.values())
        shares = Counter(next(iter(ranks)) for ranks in owner.values())
        assert max(shares.values()) - min(shares.values()) <= 6 // world
    assert len(orders) == 4
    if not shuffle:
        assert {order[:size] for _, order in orders} == {tuple(range(size))}


def test_with_slots_an_infinite_sampler_keeps_them_over_the_border_of_passes(monkeypatch):
    """10 images in 4 slots: a pass has 12 places."""
    shards = [iter(on_rank(monkeypatch, r, 2, range(10), seed=3, infinite=True, slots=4)) for r in range(2)]
    seen = [[next(shard) for _ in range(24)] for shard in shards]
    assert not set(map(int, seen[0])) & set(map(int, seen[1]))
    assert set(map(int, seen[0] + seen[1])) == set(range(10))
    assert [i.epoch for i in seen[0]] == [e for e in range(4) for _ in range(6)]


def test_slots_mix_the_images_of_a_slot_and_the_slots_themselves():
    """Over 3,000 epochs an image of a slot of 5 is at each of its places with a share of 1/5 (16 degrees of freedom, P = 0.0008),
    and slots are not the data set's neighbours."""
    sampler_ = KeyedSampler(range(20), seed=0, slots=4)
    counts = np.zeros((5, 5))
    for epoch in range(3000):
        sampler_.set_epoch(epoch)
        first = list(sampler_)[0::4]
        if epoch == 0:
            members = sorted(first)
        for place, i in enumerate(first):
            counts[place, members.index(i)] += 1
    assert ((counts - 600) ** 2 / 600).sum() < 40
    assert members not in ([0, 4, 8, 12, 16], [0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    ("world", "slots", "message"),
    [
        (4, 6, r"KeyedSampler\(slots=6\) on 4 ranks: expected a multiple of the ranks, .*slots=8"),
        (1, 11, r"has 10 images, expected at least one a slot; .*slots=10"),
        (4, 12, r"has 10 images, .*slots=8"),
        (1, 0, r"slots must be a whole number >= 1 or None, got 0"),
        (1, 2.0, r"got 2.0"),
        (1, True, r"got True"),
    ],
)
def test_slots_that_cannot_be(monkeypatch, world, slots, message):
    with pytest.raises(ValueError, match=message):
        on_rank(monkeypatch, 0, world, range(10), slots=slots)


def test_an_index_keeps_its_epoch_through_pickle():
    index = pickle.loads(pickle.dumps(KeyedIndex(5, 2, 9)))
    assert (index, index.epoch, index.seed) == (5, 2, 9)
    assert [10, 11, 12, 13, 14, 15][index] == 15


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="the data set is empty; check ann_file"):
        KeyedSampler([])


class Pictures:
    """What a grouping batch sampler reads: every third image is upright."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def get_data_info(self, i):
        return dict(width=10, height=20 if i % 3 == 0 else 5)

    def __getitem__(self, i):
        return i


@pytest.mark.parametrize("grouped", [True, False])
def test_batches_start_anywhere_and_forget_nothing(grouped):
    from mmdet.datasets.samplers import AspectRatioBatchSampler

    data = Pictures(20)
    keyed = KeyedSampler(data, seed=1)
    kind = AspectRatioBatchSampler if grouped else BatchSampler
    batches = KeyedBatches(kind(keyed, 3, drop_last=False), keyed)
    keyed.set_epoch(4)
    whole = list(batches)
    assert Counter(i for b in whole for i in b) == Counter(range(20))
    abandoned = iter(batches)
    next(abandoned)
    for k in range(len(whole) + 1):
        batches.start_at(4, k)
        keyed.set_epoch(0)
        rest = iter(batches)
        keyed.set_epoch(9)
        assert list(rest) == whole[k:]
    keyed.set_epoch(4)
    assert list(batches) == whole
    assert (batches.batch_size, batches.plain, len(batches)) == (3, not grouped, 7)


def test_a_data_sets_own_getitems_is_kept():
    class Whole(Pictures):
        def __getitems__(self, indices):
            return [-i for i in indices]

    for data, sign in ((Pictures(5), 1), (Whole(5), -1)):
        loader = attach(DataLoader(data, batch_size=2, sampler=KeyedSampler(data, shuffle=False, seed=0)))
        assert torch.cat(list(attach(loader))).tolist() == [sign * i for i in range(5)]
