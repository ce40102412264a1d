"""``python -m benchmarks.memory.sizes [--into docs/memory.md]``: what a memory of COCO and of Objects365 takes at each setting.

The library's own forecast, for sets whose images all have one size that stands for the mean: an assumption, said above the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ikd_fast.attack.memory import PerturbationMemory
from ikd_fast.attack.memory.forecast import BITS, STRIDES, human

IMAGES = {"COCO train2017": 118_287, "Objects365 v2 train": 1_742_289}
SIZES = {"original": (480, 640), "network": (800, 1067)}
"""(H, W) that stands for all images, and what ``Resize(scale=(1333, 800), keep_ratio=True)`` makes of it."""
BEGIN, END = "<!-- sizes: generated below -->", "<!-- sizes: generated above -->"


def per_image(resolution: str, momentum: bool) -> dict[tuple[int, int], int]:
    """Bytes by (bits, stride)."""
    found = PerturbationMemory().forecast([SIZES[resolution]], resolution=resolution, momentum=momentum)
    return {(bits, stride): found.choices[bits, stride, resolution] for bits in BITS for stride in STRIDES}


def table() -> str:
    """As Markdown."""
    sets = [f"{name} ({count:,})" for name, count in IMAGES.items()]
    heads = [
        "resolution",
        "stride",
        "bits",
        "bytes an image",
        *(part for s in sets for part in (s, "with momentum")),
    ]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for resolution in SIZES:
        plain, moving = per_image(resolution, False), per_image(resolution, True)
        for stride in STRIDES:
            for bits in BITS:
                one, two = plain[bits, stride], moving[bits, stride]
                sizes = [human(n * size) for n in IMAGES.values() for size in (one, two)]
                cells = [resolution, str(stride), str(bits), f"{one:,}", *sizes]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def within(text: str) -> str:
    """``text`` with the table between its marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory.sizes")
    parser.add_argument("--into", type=Path, metavar="FILE.md", help=f"write it between {BEGIN} and {END}")
    into = parser.parse_args(argv).into
    if into is None:
        print(table())
    else:
        into.write_text(within(into.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
