"""One adversarial image as the bytes of a file: PNG, JPEG, or the perturbation alone in a few bits a value."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ikd_fast.attack.memory.record import Record
from ikd_fast.attack.memory.shards.layout import decode_record, encode_record
from ikd_fast.kernels.reference.delta_codes import DeltaCodes

FORMATS = {"png": ".png", "jpeg": ".jpg", "packed": ".delta"}
"""Names of formats, and the suffix of their files."""
OTHER = "it was made from another image, or something before it has changed the image (a flip, colours)"
PNG_EFFORT = 2
"""zlib's level: perturbed pixels hardly compress, and higher ones take several times as long."""


@dataclass(frozen=True)
class Format:
    """How an image is kept.

    Args:
        kind: ``"png"`` (lossless after rounding to uint8), ``"jpeg"`` (as published: truncated to uint8, compressed), ``"packed"``
            (the perturbation, :class:`~ikd_fast.kernels.DeltaCodes`; exact where it is a multiple of ``step``).
        quality: of the JPEG, 1..100; the published code's is 95.
        scale: saved at this share of the attacked size, bilinear, or at the file's own size, ``"original"``, as published; 1: as
            attacked. Not for ``packed``.
        bits, stride, step: of ``packed``, as :class:`~ikd_fast.attack.PerturbationMemory` has them.

    Raises:
        ValueError: out of range, or not for this kind.

    >>> Format("jpeg", quality=95, scale="original").saved_size((800, 1067), (480, 640))
    (480, 640)
    """

    kind: str = "png"
    quality: int = 95
    scale: float | str = 1.0
    bits: int = 4
    stride: int = 1
    step: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in FORMATS:
            raise ValueError(f"kind must be one of {list(FORMATS)}, got {self.kind!r}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality of a JPEG must be in 1..100, got {self.quality}")
        if self.scale != "original" and not (isinstance(self.scale, (int, float)) and 0 < self.scale <= 1):
            raise ValueError(f"scale must be 'original' or a number in 0..1 above 0, got {self.scale!r}")
        if self.kind == "packed" and self.scale != 1:
            raise ValueError(
                f"a packed perturbation belongs to the size that was attacked: expected scale=1, got {self.scale!r}"
            )
        if self.stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {self.stride!r}")

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Format:
        return cls(**said)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def suffix(self) -> str:
        return FORMATS[self.kind]

    @property
    def resized(self) -> bool:
        """Whether files have another size than what was attacked."""
        return self.scale != 1

    def saved_size(self, size: tuple[int, int], original: tuple[int, int]) -> tuple[int, int]:
        """(h, w) in the file of an image that was attacked at ``size``."""
        if isinstance(self.scale, str):
            return original
        return max(1, round(size[0] * self.scale)), max(1, round(size[1] * self.scale))

    def encode(
        self, key: int, clean: np.ndarray, moved: Tensor, original: tuple[int, int], eps: float
    ) -> bytes:
        """An image's file.

        Args:
            key: of the image.
            clean: uint8 ``[H, W, 3]``, what was attacked: BGR; for ``packed`` in the teacher's order of channels.
            moved: float ``[3, H, W]`` in 0..255, the same order: the adversarial image.
            original: (h, w) of the image's own file.
            eps: radius of the attack, grey levels.
        """
        pixels = moved.detach().float().cpu().clamp(0, 255)
        if self.kind == "packed":
            return encode_record(key, self._record(pixels - _chw(clean), eps, zlib.crc32(clean.tobytes())))
        # A normalised integer comes back a rounding below itself, and truncation would take a whole level of it.
        whole = pixels.round() if self.kind == "png" else (pixels + 1e-3).floor()
        image = np.ascontiguousarray(whole.permute(1, 2, 0).numpy().astype(np.uint8))
        cv2 = opencv()
        h, w = self.saved_size(clean.shape[:2], original)
        if (h, w) != clean.shape[:2]:
            image = cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)
        flag, value = (
            (cv2.IMWRITE_PNG_COMPRESSION, PNG_EFFORT)
            if self.kind == "png"
            else (cv2.IMWRITE_JPEG_QUALITY, self.quality)
        )
        done, data = cv2.imencode(self.suffix, image, [int(flag), int(value)])
        if not done:
            raise RuntimeError(f"OpenCV cannot write an image of {h}x{w} as {self.kind}")
        return data.tobytes()

    def decode(self, key: int, data: bytes, clean: np.ndarray, eps: float) -> np.ndarray:
        """The adversarial image of ``clean`` (uint8 ``[H, W, 3]``, channels as in :meth:`encode`), of its size, from a file's bytes.

        Raises:
            ValueError: damaged, of another size, or not made from ``clean``: a value is further from it than the attack went.
        """
        if self.kind == "packed":
            record = decode_record(key, data)
            if record.size != clean.shape[:2]:
                raise ValueError(_sizes(record.size, clean.shape[:2]))
            if record.step != zlib.crc32(clean.tobytes()):
                raise ValueError(OTHER)
            grey = self.delta(record, 3, eps).round().to(torch.int16)
            moved = (_chw(clean).to(torch.int16) + grey).clamp_(0, 255).to(torch.uint8)
            return np.ascontiguousarray(moved.permute(1, 2, 0).numpy())
        cv2 = opencv()
        if not data:
            raise ValueError(
                "the file is empty; delete it, and the same `ikd-fast attack` command makes it again"
            )
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise ValueError(
                "the file is damaged; delete it, and the same `ikd-fast attack` command makes it again"
            )
        if image.shape != clean.shape:
            if not self.resized:
                raise ValueError(_sizes(image.shape[:2], clean.shape[:2]))
            height, width = clean.shape[:2]
            return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        if self.kind == "png" and not self.resized:
            gap = int(cv2.absdiff(image, clean).max())
            if gap > np.ceil(eps):
                raise ValueError(
                    f"it is {gap} grey levels away from the image that was loaded, and the attack went {eps:g}: {OTHER}"
                )
        return image

    def codes(self, eps: float) -> DeltaCodes:
        return DeltaCodes.of(eps, self.step, self.bits)

    def delta(self, record: Record, channels: int, eps: float) -> Tensor:
        """Grey levels ``[C, H, W]`` of a packed perturbation."""
        (height, width), s = record.size, self.stride
        codes = self.codes(eps)
        cells = codes.decode(codes.unpack(record.delta, (channels, -(-height // s), -(-width // s))))
        return cells.repeat_interleave(s, 1).repeat_interleave(s, 2)[:, :height, :width] if s > 1 else cells

    def _record(self, grey: Tensor, eps: float, clean: int) -> Record:
        """``step`` of the record is the CRC-32 of the clean image: it is of no training step."""
        codes = self.codes(eps)
        # A cell of several pixels holds their mean; one that reaches beyond the image, that of those it has.
        cells = grey if self.stride == 1 else avg_pool2d(
            grey[None], self.stride, ceil_mode=True, count_include_pad=False
        )[0]  # fmt: skip
        return Record(
            (grey.shape[1], grey.shape[2]), visits=1, step=clean, delta=codes.pack(codes.encode(cells))
        )


def opencv() -> Any:
    """Raises:
    ImportError: says how to have it.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError("PNG and JPEG need OpenCV: pip install opencv-python") from error
    return cv2


def _chw(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()


def _sizes(there: tuple[int, ...], here: tuple[int, ...]) -> str:
    return (
        f"it was made for an image of {there[0]}x{there[1]}, the one that was loaded has {here[0]}x{here[1]}: it belongs behind the same "
        "Resize, and before flips and crops"
    )
