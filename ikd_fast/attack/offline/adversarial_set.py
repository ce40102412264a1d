"""A folder of adversarial images, one file an image."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path, PurePath

import numpy as np
import torch

from ikd_fast.attack.memory.record import Record
from ikd_fast.attack.memory.shards.layout import decode_record

from .manifest import NAME, SetManifest

IMAGES = "images"
MAX_STEM = 150
"""Bytes: file systems take names of 255, and there is a temporary one."""
IDS = (1 << 64) - 1


class NoSet(FileNotFoundError):
    """There is no set of adversarial images."""


class AdversarialSet:
    """What ``ikd-fast attack`` has made.

    ::

        adversarial.json      settings; at the end means of the images' strength
        strength.jsonl        strength of each image
        images/STEM.KEY.png   one file an image: the stem of its own file, and its key in hexadecimal

    Args:
        directory: of the set.

    Raises:
        NoSet: a FileNotFoundError; there is no set.
        ValueError: its manifest cannot be read.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        manifest = SetManifest.read(self.directory)
        if manifest is None:
            raise NoSet(
                f"{self.directory / NAME} is not there; `ikd-fast attack CONFIG CKPT --out {self.directory}` makes a set of adversarial "
                "images"
            )
        self.manifest = manifest

    def __repr__(self) -> str:
        return f"AdversarialSet({str(self.directory)!r}, {self.manifest.format.kind}, {self.manifest.images} images)"

    def path(self, key: int, name: str | None) -> Path:
        """File of the image with this 64-bit key, whose own file is ``name``."""
        return self.directory / IMAGES / file_name(key, name, self.manifest.format.suffix)

    def load(self, key: int, name: str | None, clean: np.ndarray) -> np.ndarray:
        """The adversarial image of ``clean``, uint8 ``[H, W, 3]`` BGR, of its size.

        Raises:
            FileNotFoundError: it was not made.
            ValueError: the file is damaged, or belongs to an image of another size or content. Both name the file.
        """
        path = self.path(key, name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path}: {name or 'an image'} has no adversarial image in this set, which is of {self.manifest.images}; the same "
                "`ikd-fast attack` command, without --images, makes those that are missing"
            ) from None
        fmt, turned = (
            self.manifest.format,
            self.manifest.channels == "rgb" and self.manifest.format.kind == "packed",
        )
        try:
            image = np.ascontiguousarray(clean[..., ::-1]) if turned else clean
            moved = fmt.decode(key & IDS, data, image, self.manifest.eps)
        except ValueError as error:
            raise ValueError(f"{path}, adversarial image of {name}: {error}") from None
        return np.ascontiguousarray(moved[..., ::-1]) if turned else moved

    @cached_property
    def files(self) -> dict[int, Path]:
        """Whole files by key."""
        return dict(listed(self.directory, self.manifest.format.suffix))

    def record(self, key: int) -> Record | None:
        """The packed perturbation of an image, or None where there is none. Its ``step`` is the CRC-32 of the clean image.

        Raises:
            Unreadable: it is damaged.
            ValueError: the set has images, not perturbations.
        """
        if self.manifest.format.kind != "packed":
            raise ValueError(
                f"{self.directory} has files of format {self.manifest.format.kind!r}; perturbations alone are written by "
                "`ikd-fast attack ... --packed`"
            )
        path = self.files.get(key & IDS)
        if path is None:
            return None
        return decode_record(key & IDS, path.read_bytes())

    def grey(self, record: Record, channels: int) -> torch.Tensor:
        """Grey levels ``[C, H, W]`` of a record of this set."""
        return self.manifest.format.delta(record, channels, self.manifest.eps)


def file_name(key: int, name: str | None, suffix: str) -> str:
    """Of the image's own name and its key.

    >>> file_name(0x2A, "/data/coco/train2017/000000000009.jpg", ".png")
    '000000000009.000000000000002a.png'
    """
    # A name that begins with a dot is that of a file in the making.
    stem = PurePath(name).stem.lstrip(".").encode()[:MAX_STEM].decode(errors="ignore") if name else ""
    return f"{stem or 'image'}.{key & IDS:016x}{suffix}"


def listed(directory: Path, suffix: str) -> Iterable[tuple[int, Path]]:
    """(key, path) of the whole files of a set."""
    folder = directory / IMAGES
    if not folder.is_dir():
        return
    for entry in os.scandir(folder):
        # An empty file is what a machine that failed may leave of one that was not on the disk yet.
        if not entry.name.startswith(".") and entry.name.endswith(suffix) and entry.stat().st_size:
            try:
                yield int(entry.name.removesuffix(suffix)[-16:], 16), Path(entry.path)
            except ValueError:
                continue
