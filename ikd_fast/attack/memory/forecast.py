"""How much memory perturbations will take, before the first is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Size = tuple[int, int]

BITS, STRIDES = (8, 4, 2), (1, 2)


def record_bytes(size: Size, *, bits: int, stride: int, channels: int = 3, momentum: bool = False) -> int:
    """Bytes of one image's record: packed codes, and a float16 velocity per cell where there is momentum.

    >>> record_bytes((800, 1333), bits=4, stride=1), record_bytes((800, 1333), bits=4, stride=2)
    (1600800, 400800)
    """
    height, width = (-(-side // stride) for side in size)
    packed = channels * height * -(-width * bits // 8)
    return packed + (2 * channels * height * width if momentum else 0)


@dataclass(frozen=True)
class Forecast:
    """What a memory will hold once every image has been met.

    Attributes:
        images: images.
        bytes: of all records.
        per_image: mean bytes of a record.
        bits, stride, resolution: the settings it is for.
        choices: bytes of every (bits, stride, resolution) whose sizes are known.
    """

    images: int
    bytes: int
    bits: int
    stride: int
    resolution: str
    choices: Mapping[tuple[int, int, str], int] = field(default_factory=dict, repr=False)

    @property
    def per_image(self) -> float:
        return self.bytes / self.images if self.images else 0.0

    def __str__(self) -> str:
        return self.told(" of host memory")

    def told(self, where: str = "") -> str:
        """In a line; ``where`` follows the bytes."""
        return (
            f"{self.images} images x {human(self.per_image)} = {human(self.bytes)}{where} ({self.bits} bits, stride "
            f"{self.stride}, {self.resolution} resolution)"
        )


def forecast(
    sizes: Mapping[str, Iterable[Size]],
    *,
    bits: int,
    stride: int,
    resolution: str,
    channels: int,
    momentum: bool,
) -> Forecast:
    """``sizes``: canonical (H, W) of every image, for each resolution that is known; ``resolution`` is the one to be used."""
    counts = {name: Counter((int(h), int(w)) for h, w in rows) for name, rows in sizes.items()}

    def total(name: str, b: int, s: int) -> int:
        return sum(
            n * record_bytes(size, bits=b, stride=s, channels=channels, momentum=momentum)
            for size, n in counts[name].items()
        )

    choices = {(b, s, name): total(name, b, s) for name in counts for b in BITS for s in STRIDES}
    return Forecast(
        images=sum(counts[resolution].values()),
        bytes=choices[bits, stride, resolution],
        bits=bits,
        stride=stride,
        resolution=resolution,
        choices=choices,
    )


def human(count: float) -> str:
    """Decimal units, as disks and memory are sold.

    >>> human(0), human(54.5e9), human(1999)
    ('0 B', '54.5 GB', '2 kB')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
