"""The process's global generators, seeded by a key for as long as somebody else's code draws for one image."""

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

    ``stream`` and ``index`` are further parts of the key; the generator of a ``device`` other than the CPU is treated likewise.

    >>> with keyed_generators(0, 7, 1):
    ...     a = np.random.rand()
    >>> with keyed_generators(0, 7, 1):
    ...     a == np.random.rand()
    True
    """
    words = [int(u * 2.0**24) for block in range(2) for u in draw(seed, id, epoch, stream, 2 * index + block)]
    for_torch = words[6] << 24 | words[7]
    module, devices, kind = None, [], "cuda"
    if device is not None and device.type != "cpu":
        module, kind = torch.get_device_module(device), device.type
        devices = [module.current_device() if device.index is None else device.index]
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=devices, device_type=kind):
        # Not torch.manual_seed: it reaches for every GPU as well.
        torch.default_generator.manual_seed(for_torch)
        if module is not None:
            with module.device(devices[0]):
                module.manual_seed(for_torch)
        random.seed(words[0] << 24 | words[1])
        np.random.seed(words[2:6])  # noqa: NPY002 - the global one is what is drawn from
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
