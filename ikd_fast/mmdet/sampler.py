"""The order of the images as a function of (seed, epoch), for loops that are resumed in the middle of an epoch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler

from ikd_fast.generators import keyed_generators
from ikd_fast.kernels.reference.philox import Stream
from ikd_fast.order import KeyedIndex, keyed_order, slotted_order

from mmdet.registry import DATA_SAMPLERS
from mmengine.dist import get_dist_info, sync_random_seed

from .progress import sample_epoch


@DATA_SAMPLERS.register_module()
class KeyedSampler(Sampler):
    """Images in an order that is a function of (seed, epoch), the same whatever the number of ranks, workers or resumes.

    Rank r of W gets positions r, r + W, ... of the epoch's order, so iteration t of W ranks with batch b has the images
    that one process with batch W b has. Every image comes once per epoch; where W does not divide the number of images
    the epoch is filled up with images from its own beginning (as mmengine's ``DefaultSampler(round_up=True)``).

    A run resumed from a checkpoint inside an epoch (``CheckpointHook(by_epoch=False, interval=k)``, ``--resume``) goes on
    with the next image, in both train loops and with any ``batch_sampler``: :class:`~ikd_fast.mmdet.resume.KeyedResumeHook`, which
    importing ``ikd_fast.mmdet`` adds to every Runner, keeps the position in the checkpoint. On another number of ranks it does so
    where ranks x batch size is the same; otherwise resuming inside an epoch is refused, resuming at an epoch's end is not.

    In a loader built by the Runner every sample is loaded with its own epoch, for transforms that draw keyed numbers (workers
    load ahead across the border of a pass), and with the global generators seeded by (seed, epoch, index), so that random
    transforms and substitutes for broken images do not depend on the workers. In any other ``DataLoader`` the order holds, the
    rest does not; there transforms need ``set_epoch``, and position and seeding are the caller's.

    Args:
        dataset: anything with a length.
        shuffle: False for the data set's own order in every epoch.
        seed: 0..2**64-1. Default: the Runner's seed, or one that the ranks agree on. A resumed run keeps its checkpoint's.
        infinite: for ``IterBasedTrainLoop``: pass follows pass without an end and without filling up; batches go across the border.
        slots: give each image one of so many slots, by its own draw, and fill places p, p + slots, ... of every epoch with the images of
            slot p. Each image is then met by one rank in the whole run, for what a rank keeps of its images (mode ``carry``).
            A multiple of the number of ranks; the order depends on it and not on the ranks, so ranks x batch size is a good choice. The
            epoch is filled up to a multiple of it, from each slot's own images, also where ``infinite``.

    Raises:
        ValueError: an empty data set; ``slots`` that are no multiple of the ranks or more than the images.

    >>> sampler = KeyedSampler(range(6), seed=0)
    >>> list(sampler)
    [3, 4, 1, 0, 2, 5]
    >>> sampler.set_epoch(1)
    >>> sorted(sampler) == list(range(6)) and list(sampler) != [3, 4, 1, 0, 2, 5]
    True

    With two slots the images at even places are the same three in every epoch:

    >>> sampler = KeyedSampler(range(6), seed=0, slots=2)
    >>> list(sampler)
    [3, 1, 4, 0, 5, 2]
    >>> sampler.set_epoch(1)
    >>> list(sampler)
    [5, 2, 4, 0, 3, 1]
    """

    def __init__(
        self,
        dataset: Sized,
        shuffle: bool = True,
        seed: int | None = None,
        infinite: bool = False,
        slots: int | None = None,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError(
                "KeyedSampler: the data set is empty; check ann_file, data_prefix and filter_cfg"
            )
        self.rank, self.world_size = get_dist_info()
        if slots is not None:
            _check_slots(slots, self.world_size, len(dataset))
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = sync_random_seed() if seed is None else int(seed)
        self.infinite = infinite
        self.slots = slots
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that iterating next gives; an infinite sampler counts its passes itself."""
        self.epoch = int(epoch)

    def order(self, epoch: int) -> list[int]:
        """Every index once, as all ranks together see them in ``epoch``; with slots, some a second time to fill it up."""
        size = len(self.dataset)
        order = keyed_order(size, epoch, self.seed) if self.shuffle else torch.arange(size)
        if self.slots is not None:
            order = slotted_order(order, self._slot_of(self.slots), self.slots)
        return order.tolist()

    @property
    def pass_length(self) -> int:
        """Places of a pass, all ranks together: each image once, and what fills it up where there are slots."""
        size, group = len(self.dataset), self.slots or 1
        return -(-size // group) * group

    def _slot_of(self, slots: int) -> Tensor:
        """int64 ``[size]``. By its own draw where images are shuffled: neighbours in a data set are often alike."""
        size = len(self.dataset)
        dealt = torch.arange(size) % slots
        if not self.shuffle:
            return dealt
        return torch.empty_like(dealt).scatter_(0, keyed_order(size, 0, self.seed, stream=Stream.SLOT), dealt)

    def __iter__(self) -> Iterator[int]:
        if self.infinite:
            stream = (KeyedIndex(i, e, self.seed) for e in itertools.count() for i in self.order(e))
            return itertools.islice(stream, self.rank, None, self.world_size)
        order = self.order(self.epoch)
        filled = itertools.islice(itertools.cycle(order), len(self) * self.world_size)
        mine = itertools.islice(filled, self.rank, None, self.world_size)
        return iter([KeyedIndex(i, self.epoch, self.seed) for i in mine])

    def __len__(self) -> int:
        """Samples of this rank in an epoch; of an infinite sampler, the data set's length (as mmengine's InfiniteSampler)."""
        return len(self.dataset) if self.infinite else -(-self.pass_length // self.world_size)


def _check_slots(slots: int, ranks: int, images: int) -> None:
    if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
        raise ValueError(f"KeyedSampler: slots must be a whole number >= 1 or None, got {slots!r}")
    if slots % ranks:
        raise ValueError(
            f"KeyedSampler(slots={slots}) on {ranks} ranks: expected a multiple of the ranks, or an image would change its rank; write "
            f"train_dataloader.sampler.slots={-(-slots // ranks) * ranks}"
        )
    if slots > images:
        fits = images // ranks * ranks
        raise ValueError(
            f"KeyedSampler(slots={slots}): the data set has {images} images, expected at least one a slot; write "
            f"train_dataloader.sampler.slots={fits or None}"
        )


class KeyedBatches:
    """The batch sampler of a loader, able to start in the middle of an epoch without loading what comes before.

    ``start_at(epoch, batches)`` holds for the next iteration that is used, whatever ``set_epoch`` says in between.
    """

    def __init__(self, batches: Any, sampler: KeyedSampler) -> None:
        self.sampler = sampler
        self._fresh = copy.deepcopy(batches, {id(sampler): sampler})
        self._start: tuple[int, int] | None = None

    @property
    def batch_size(self) -> int:
        return self._fresh.batch_size

    @property
    def drop_last(self) -> bool:
        return bool(getattr(self._fresh, "drop_last", False))

    @property
    def plain(self) -> bool:
        """Whether batches are the sampler's indices in order, so that other ranks could go on with them."""
        return type(self._fresh) is BatchSampler

    def start_at(self, epoch: int, batches: int) -> None:
        """Begin the next iteration in ``epoch``, after its first ``batches`` batches."""
        self._start = (epoch, batches)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, skip = self._start or (self.sampler.epoch, 0)
        # The epoch as it is now, not when the first batch is asked for; and a batch sampler may keep images back for a later
        # batch, so each iteration has an untouched copy.
        sampler = copy.copy(self.sampler)
        sampler.set_epoch(epoch)
        batches = itertools.islice(copy.deepcopy(self._fresh, {id(self.sampler): sampler}), skip, None)
        return self._run(batches, self._start)

    def _run(self, batches: Iterator[list[int]], start: tuple[int, int] | None) -> Iterator[list[int]]:
        # Only now: a loader with workers asks for an iterator twice and uses the second one.
        if self._start is start:
            self._start = None
        yield from batches

    def __len__(self) -> int:
        return len(self._fresh)


class KeyedFetch:
    """``dataset.__getitems__``, which torch's loaders call with a batch of indices: each sample in the epoch of its index."""

    def __init__(self, dataset: Any, inner: Any = None) -> None:
        self.dataset, self.inner = dataset, inner

    def __call__(self, indices: Iterable[int]) -> list[Any]:
        return [self._load(index) for index in indices]

    def _load(self, index: int) -> Any:
        if not isinstance(index, KeyedIndex):
            return self._item(index)
        with sample_epoch(index.epoch), keyed_generators(index.seed, int(index), index.epoch):
            return self._item(int(index))

    def _item(self, index: int) -> Any:
        return self.dataset[index] if self.inner is None else self.inner([index])[0]


def keyed_batches(loader: Any) -> KeyedBatches | None:
    """The batches of a loader with a :class:`KeyedSampler`, None for others."""
    batches = getattr(loader, "batch_sampler", None)
    return batches if isinstance(batches, KeyedBatches) else None


def keyed_sampler(loader: Any) -> KeyedSampler | None:
    """The :class:`KeyedSampler` of a loader, None for others."""
    batches = keyed_batches(loader)
    return None if batches is None else batches.sampler


def attach(loader: DataLoader) -> DataLoader:
    """Let a loader with a :class:`KeyedSampler` start anywhere and load each sample in its own epoch; others stay as they are."""
    batches = getattr(loader, "batch_sampler", None)
    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, KeyedSampler) and not isinstance(batches, KeyedBatches):
        # DataLoader refuses to have it replaced, for the sake of iterators that exist; there is none yet.
        loader.__dict__["batch_sampler"] = KeyedBatches(batches, sampler)
        dataset: Any = loader.dataset
        if not isinstance(getattr(dataset, "__getitems__", None), KeyedFetch):
            dataset.__getitems__ = KeyedFetch(dataset, getattr(dataset, "__getitems__", None))
    return loader
