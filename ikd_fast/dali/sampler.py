"""The order of a loader in plain PyTorch: keyed, sharded, able to go on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler

from ikd_fast.order import KeyedIndex, keyed_order


class KeyedShardSampler(Sampler[list[int]]):
    """Batches of indices in an order that is a function of (seed, epoch), each shard its own part of every epoch.

    Shard s of S gets places s, s + S, ... of the epoch's order: shards are disjoint and together complete. They differ by one
    image where S does not divide the number; with ``even=True`` the epoch is filled up from its own beginning, as
    ``DistributedSampler`` does, so that ranks that wait for each other have as many.

    Args:
        dataset: anything with a length.
        batch_size: images a batch; the last one of an epoch may have fewer.
        shuffle: False for the data set's own order.
        seed: 0..2**64-1.
        shard_id, num_shards: this one of so many.
        even, drop_last: above; leave out a last batch with fewer images.

    Raises:
        ValueError: an empty data set, numbers out of their range.

    >>> a, b = (KeyedShardSampler(range(5), 2, shard_id=i, num_shards=2) for i in range(2))
    >>> list(a), list(b), len(a)
    ([[3, 1], [2]], [[4, 0]], 2)
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int = 1,
        *,
        shuffle: bool = True,
        seed: int = 0,
        shard_id: int = 0,
        num_shards: int = 1,
        even: bool = False,
        drop_last: bool = False,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("KeyedShardSampler: the data set is empty")
        for name, number in (
            ("batch_size", batch_size),
            ("seed", seed),
            ("shard_id", shard_id),
            ("num_shards", num_shards),
        ):
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ValueError(f"KeyedShardSampler: {name} must be a whole number >= 0, got {number!r}")
        if batch_size < 1 or num_shards < 1 or not 0 <= shard_id < num_shards:
            raise ValueError(
                f"KeyedShardSampler: expected batch_size >= 1 and 0 <= shard_id < num_shards, got {batch_size}, {shard_id}, {num_shards}"
            )
        self.dataset, self.batch_size, self.shuffle, self.seed = dataset, batch_size, shuffle, int(seed)
        self.shard_id, self.num_shards, self.even, self.drop_last = shard_id, num_shards, even, drop_last
        self.epoch = 0
        self._skip = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that iterating next gives; without a call it is the same one again."""
        if epoch < 0:
            raise ValueError(f"KeyedShardSampler: set_epoch expects epoch >= 0, got {epoch}")
        self.epoch = int(epoch)

    def start_at(self, batches: int) -> None:
        """Leave out so many batches of the next iteration: they are done."""
        if batches < 0:
            raise ValueError(f"KeyedShardSampler: start_at expects batches >= 0, got {batches}")
        self._skip = int(batches)

    def indices(self) -> list[KeyedIndex]:
        """This shard's images in this epoch."""
        size = len(self.dataset)
        order = (keyed_order(size, self.epoch, self.seed) if self.shuffle else torch.arange(size)).tolist()
        if self.even:
            order += (
                order[: -size % self.num_shards]
                if self.num_shards <= size
                else (order * self.num_shards)[: -size % self.num_shards]
            )
        return [KeyedIndex(i, self.epoch, self.seed) for i in order[self.shard_id :: self.num_shards]]

    def __iter__(self) -> Iterator[list[int]]:
        # The epoch as it is now, not when the first batch is asked for.
        mine, skip = self.indices(), self._skip
        starts = range(0, len(mine), self.batch_size)[: len(self)]
        return self._run([mine[i : i + self.batch_size] for i in starts[skip:]], skip)

    def _run(self, batches: list[list[KeyedIndex]], skip: int) -> Iterator[list[int]]:
        # Only now: a loader with workers asks for an iterator twice and uses the second one.
        if self._skip == skip:
            self._skip = 0
        for batch in batches:
            yield list(batch)

    def __len__(self) -> int:
        images = len(range(self.shard_id, len(self.dataset), self.num_shards))
        if self.even:
            images = -(-len(self.dataset) // self.num_shards)
        return images // self.batch_size if self.drop_last else -(-images // self.batch_size)
