"""Perturbations made before training, as the first ones of a memory."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

import torch

from ikd_fast.kernels.reference.delta_codes import DeltaCodes

from .record import MemorySettings, Record, differences

if TYPE_CHECKING:
    from ikd_fast.attack.offline import AdversarialSet


class Seed:
    """The packed set of ``ikd-fast attack ... --packed`` in a memory's own codes.

    ``visits`` of its records are the gradients they have had, so that ``refresh`` counts gradients.

    Args:
        directory: of the set.
        stride: of the memory.

    Raises:
        FileNotFoundError, ValueError: no set; images instead of perturbations; another stride.
    """

    def __init__(self, directory: str | os.PathLike[str], stride: int) -> None:
        from ikd_fast.attack.offline import AdversarialSet

        self.set: AdversarialSet = AdversarialSet(directory)
        fmt = self.set.manifest.format
        if fmt.kind != "packed":
            raise ValueError(
                f"a memory is seeded with perturbations, which `ikd-fast attack ... --packed` writes; {directory} has {fmt.kind} images"
            )
        if not self.set.manifest.attack["steps"]:
            raise ValueError(f"{directory} has random signs and no gradient in them: nothing to start from")
        if fmt.stride != stride:
            raise ValueError(
                f"{directory} has perturbations of stride {fmt.stride}, the memory has {stride}; write memory=dict(stride={fmt.stride})"
            )

    def check(self, settings: MemorySettings) -> None:
        """Raise where the perturbations are not for what the memory is for; the differences are named."""
        manifest = self.set.manifest
        there = {
            "eps": manifest.eps,
            "data": manifest.data,
            "size": manifest.size,
            "teacher": manifest.teacher,
            "objective": manifest.attack["objective"],
        }
        now = {name: value for name, value in settings.as_dict().items() if name in there}
        differ = differences(there, now)
        if differ:
            raise ValueError(
                f"{self.set.directory} was made for something else than this run ({'; '.join(differ)}): its perturbations cannot seed this "
                "memory"
            )
        if len(self.set.files) < manifest.images:
            warnings.warn(
                f"{self.set.directory} has {len(self.set.files)} of {manifest.images} perturbations: the other images start at random",
                stacklevel=3,
            )

    def record(self, id: int, codes: DeltaCodes, settings: MemorySettings) -> Record | None:
        """Of an image, in ``codes``; None where the set has none.

        Raises:
            Unreadable: it is damaged.
        """
        found = self.set.record(id)
        if found is None:
            return None
        manifest, (height, width) = self.set.manifest, found.size
        s = manifest.format.stride
        shape = (settings.channels, -(-height // s), -(-width // s))
        own = manifest.format.codes(manifest.eps)
        grey = own.decode(own.unpack(found.delta, shape))
        if settings.order and settings.order != manifest.channels:
            grey = grey.flip(0)
        velocity = torch.zeros(shape, dtype=torch.float16) if settings.momentum else None
        delta = codes.pack(codes.encode(grey))
        return Record(
            found.size, visits=int(manifest.attack["steps"]), step=0, delta=delta, velocity=velocity
        )
