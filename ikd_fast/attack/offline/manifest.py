"""``adversarial.json``: what a folder of adversarial images was made with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ikd_fast.files import read_versioned, write_json

from .formats import Format

NAME, VERSION = "adversarial.json", 1


@dataclass(frozen=True)
class SetManifest:
    """Of an :class:`~ikd_fast.attack.offline.AdversarialSet`.

    Attributes:
        format: of its files.
        attack: the attack's settings, ``eps`` in grey levels among them.
        teacher: hash of the victim's weights.
        data: fingerprint of the images.
        size: how the attacked size comes about: ``"original"``, or the Resize, ``"network (1333, 800) keep_ratio"``.
        channels: the teacher's order, ``"bgr"`` or ``"rgb"``; packed perturbations are in it.
        images: how many there are to be.
        summary: means of the images' strength, once all are there.
    """

    format: Format
    attack: Mapping[str, Any]
    teacher: str
    data: str
    size: str
    channels: str
    images: int
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def eps(self) -> float:
        return float(self.attack["eps"])

    def write(self, directory: Path) -> None:
        write_json(directory / NAME, {"version": VERSION, **asdict(self)})

    @classmethod
    def read(cls, directory: Path) -> SetManifest | None:
        """None where there is none.

        Raises:
            ValueError: it cannot be read; names the file.
        """
        return read_versioned(
            directory / NAME,
            "version",
            VERSION,
            lambda said: cls(**{**said, "format": Format.of(said["format"])}),
            "what `ikd-fast attack` writes",
        )

    def differences(self, now: SetManifest) -> list[str]:
        """``"eps: 8 there, 4 now"`` for whatever decides on a file's bytes."""

        def flat(manifest: SetManifest) -> dict[str, Any]:
            own = {
                name: getattr(manifest, name) for name in ("teacher", "data", "size", "channels", "images")
            }
            return {**manifest.format.as_dict(), **manifest.attack, **own}

        there, here = flat(self), flat(now)
        return [
            f"{name}: {there.get(name)} there, {here.get(name)} now"
            for name in dict.fromkeys([*there, *here])
            if there.get(name) != here.get(name)
        ]
