"""Image files of every kind that a data set may hold, made in memory."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
from PIL import Image

JPEG_ENDS = b"\xff\xd9"


def picture(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """uint8 ``[height, width, 3]`` BGR, smooth as photographs are: noise at every eighth pixel, cubic between."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def save(image: np.ndarray, kind: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    """A BGR image through Pillow, in one of its colour modes."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image[..., ::-1])).convert(mode).save(out, kind, **options)
    return out.getvalue()


def cv2_file(image: np.ndarray, extension: str = ".png") -> bytes:
    return cv2.imencode(extension, image)[1].tobytes()


def decoded(data: bytes) -> np.ndarray:
    """What mmdet's loader makes of the bytes."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def exif(orientation: int, order: str = "<", kind: int = 3, entries: int = 1) -> bytes:
    """An Exif block whose only tag is the orientation (kind 3: SHORT, 4: LONG)."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, entries)
    value = struct.pack(order + "HH", orientation, 0) if kind == 3 else struct.pack(order + "I", orientation)
    return b"Exif\0\0" + head + struct.pack(order + "HHI", 0x0112, kind, 1) + value + bytes(4)


def with_blocks(jpeg: bytes, *blocks: bytes, marker: int = 0xE1) -> bytes:
    """Application segments put right behind the start of a JPEG."""
    segments = [bytes([0xFF, marker]) + struct.pack(">H", len(b) + 2) + b for b in blocks]
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def scan_start(jpeg: bytes) -> int:
    """Where the first scan's entropy-coded bytes begin."""
    at = jpeg.index(b"\xff\xda")
    return at + 2 + struct.unpack(">H", jpeg[at + 2 : at + 4])[0]


def bad_tables(jpeg: bytes) -> bytes:
    """Its markers are in order, its Huffman tables hold more codes than there are: only a decoder notices."""
    at = jpeg.index(b"\xff\xc4") + 5
    return jpeg[:at] + b"\xff" * 16 + jpeg[at + 16 :]


def bad_check_sum(png: bytes) -> bytes:
    """One byte of its compressed data is another."""
    at = png.index(b"IDAT") + 20
    return png[:at] + bytes([png[at] ^ 0x55]) + png[at + 1 :]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    width: int, height: int, bits: int, kind: int, rows: bytes = b"", *more: bytes, interlace: int = 0
) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", head), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    )


ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""(first row, first column, row step, column step) of the seven passes."""


def interlaced(image: np.ndarray) -> bytes:
    """A BGR image as an interlaced PNG, which no library at hand writes."""
    rgb = image[..., ::-1]
    passes = [rgb[y::down, x::across] for y, x, down, across in ADAM7]
    rows = b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in part)
    return png(image.shape[1], image.shape[0], 8, 2, rows, interlace=1)
