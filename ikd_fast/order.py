"""The order of images as a function of (seed, epoch), and indices that know which epoch they are of."""

from __future__ import annotations

from pathlib import PurePath

import torch
from torch import Tensor

from ikd_fast.kernels.reference.philox import Stream, philox4x32_blocks, stable_id


def image_key(path: str | None, image_id: object) -> int:
    """64-bit key of an image: its folder and file name with its id, so that concatenated sets do not collide.

    Only the last two parts of the path count: the same data set elsewhere on disk keeps its keys.

    >>> image_key("/a/coco/train2017/1.jpg", 1) == image_key("/b/train2017/1.jpg", 1)
    True
    """
    tail = "/".join(PurePath(str(path)).parts[-2:]) if path is not None else ""
    return stable_id(tail, str(image_id))


def keyed_order(size: int, epoch: int, seed: int, *, stream: Stream = Stream.ORDER) -> Tensor:
    """int64 ``[size]``: the permutation of epoch ``epoch``, the indices sorted by 64 bits of Philox each.

    >>> keyed_order(6, epoch=0, seed=0).tolist()
    [3, 4, 1, 0, 2, 5]
    """
    blocks = torch.arange((size + 1) // 2)
    words = philox4x32_blocks(blocks, id=0, stream=stream, epoch=epoch, seed=seed).view(-1, 2)[:size]
    return torch.argsort(words[:, 0] << 32 | words[:, 1], stable=True)


def slotted_order(order: Tensor, slot_of: Tensor, slots: int) -> Tensor:
    """``order`` dealt so that place p has an image of slot p % ``slots``, each slot in ``order``'s order.

    A slot with an image fewer than others has its first one twice.

    Args:
        order: int64 ``[size]``, a permutation.
        slot_of: int64 ``[size]``, the slot of each index; every slot has one at least.

    >>> slotted_order(torch.tensor([4, 2, 0, 1, 3]), torch.tensor([0, 1, 0, 1, 0]), 2).tolist()
    [4, 1, 2, 3, 0, 1]
    """
    rows = [order[slot_of[order] == slot] for slot in range(slots)]
    depth = max(len(row) for row in rows)
    return torch.stack([torch.cat([row, row[: depth - len(row)]]) for row in rows], dim=1).flatten()


class KeyedIndex(int):
    """An index into the data set that knows the ``epoch`` and ``seed`` it was drawn for, also in a loader worker."""

    epoch: int
    seed: int

    def __new__(cls, index: int, epoch: int, seed: int) -> KeyedIndex:
        self = super().__new__(cls, index)
        self.epoch, self.seed = epoch, seed
        return self

    def __reduce__(self) -> tuple:
        return KeyedIndex, (int(self), self.epoch, self.seed)
