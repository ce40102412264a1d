"""Epochs of a fixed number of images, whatever the size of the data set. Imports mmdet."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler

import ikd_fast.mmdet  # noqa: F401  (makes mmdet importable without compiled operators)

from mmdet.registry import DATA_SAMPLERS
from mmengine.dist import get_dist_info


@DATA_SAMPLERS.register_module()
class ChunkSampler(Sampler[int]):
    """Epoch ``e`` is images ``e * chunk .. (e + 1) * chunk - 1`` of one endless sequence of shuffled passes.

    The sequence depends on the seed alone, so a resume continues it; every image comes once a pass. Each of ``world``
    processes takes every ``world``-th image of a chunk.

    Args:
        dataset: anything with a length.
        chunk: images an epoch, all processes together.
        seed: of the shuffles; pass ``p`` is shuffled with ``seed + p``.

    >>> sampler = ChunkSampler(range(5), chunk=3, seed=0)
    >>> first = list(sampler); sampler.set_epoch(1); second = list(sampler)
    >>> len(first), len(second), len(set(first + second[:2]))
    (3, 3, 5)
    """

    def __init__(self, dataset: Sized, chunk: int, seed: int | None = 0, round_up: bool = True) -> None:
        self.images, self.chunk, self.seed, self.epoch = len(dataset), chunk, seed or 0, 0
        self.rank, self.world = get_dist_info()
        if not self.images:
            raise ValueError("ChunkSampler expects a data set with at least one image, got an empty one")

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(range(self.rank, self.chunk, self.world))

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * self.chunk
        orders: dict[int, list[int]] = {}
        for position in range(start + self.rank, start + self.chunk, self.world):
            turn, index = divmod(position, self.images)
            if turn not in orders:
                generator = torch.Generator().manual_seed(self.seed + turn)
                orders[turn] = torch.randperm(self.images, generator=generator).tolist()
            yield orders[turn][index]
