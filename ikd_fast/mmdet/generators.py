"""The process's global generators, seeded by a key for as long as one sample is loaded or one box sampler draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ikd_fast.kernels.reference.philox import Stream, draw


@contextmanager
def keyed_generators(
    seed: int,
    id: int,
    epoch: int,
    *,
    stream: int = Stream.GENERATORS,
    index: int = 0,
    device: torch.device | None = None,
) -> Iterator[None]:
    """Seed ``random``, ``numpy.random`` and torch's CPU generator from (seed, id, epoch); put their states back afterwards.

    ``stream`` and ``index`` are further parts of the key; the generator of a CUDA ``device`` is treated likewise.

    >>> with keyed_generators(0, 7, 1):
    ...     a = np.random.rand()
    >>> with keyed_generators(0, 7, 1):
    ...     a == np.random.rand()
    True
    """
    words = [int(u * 2.0**24) for block in range(2) for u in draw(seed, id, epoch, stream, 2 * index + block)]
    # Not torch.manual_seed: it reaches for every GPU as well.
    generators = [torch.default_generator]
    if device is not None and device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    before = random.getstate(), np.random.get_state(), [g.get_state() for g in generators]  # noqa: NPY002
    random.seed(words[0] << 24 | words[1])
    np.random.seed(words[2:6])  # noqa: NPY002 - the global one is what is drawn from
    for generator in generators:
        generator.manual_seed(words[6] << 24 | words[7])
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        for generator, state in zip(generators, before[2], strict=True):
            generator.set_state(state)
