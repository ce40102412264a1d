"""What an image file says of itself, read from its bytes without decoding a pixel.

One truncated file fails a whole batch in DALI, and the geometry of a batch is decided before anything is decoded: so
each file's markers are walked first. ITU T.81 (JPEG), TIFF 6.0 inside Exif (orientation), ISO 15948 (PNG).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

PNG = b"\x89PNG\r\n\x1a\n"
_OTHERS = {
    b"BM": "BMP",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"RIFF": "WebP",
    b"\0\0\0\x0cjP": "JPEG 2000",
}
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE = frozenset({0x01, *range(0xD0, 0xD8)})
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


@dataclass(frozen=True)
class ImageHead:
    """Format and shape of an image file.

    Attributes:
        format: ``"JPEG"`` or ``"PNG"``.
        height, width: pixels as decoders give them, that is after the turn that Exif asks for.
        channels: 1 grey (or a palette), 2 grey and alpha, 3 colour, 4 CMYK or colour and alpha.
        bits: a channel.
        orientation: Exif, 1..8; 5 and above swap the sides as stored.
    """

    format: str
    height: int
    width: int
    channels: int
    bits: int
    orientation: int = 1


def read_head(data: bytes) -> ImageHead:
    """The head of a whole JPEG or PNG file.

    Raises:
        ValueError: empty, another format, sides of 0, a head that ends early, no end marker (the file is truncated), two Exif blocks
            that disagree on the turn (DALI 2.4 writes beyond its memory on them), or a PNG with a turn (DALI leaves those as stored).

    >>> import struct
    >>> chunk = struct.pack(">IIBBBBB", 640, 480, 8, 2, 0, 0, 0)
    >>> png = PNG + struct.pack(">I4s", 13, b"IHDR") + chunk + bytes(4) + struct.pack(">I4s", 0, b"IEND") + bytes(4)
    >>> read_head(png).width, read_head(png).channels
    (640, 3)
    """
    if not data:
        raise ValueError("expected an image, got an empty file")
    try:
        if data[:2] == b"\xff\xd8":
            head = _jpeg(data)
        elif data[:8] == PNG:
            head = _png(data)
        else:
            raise ValueError(f"expected JPEG or PNG, got {_name(data)}")
    except IndexError:
        raise ValueError(f"truncated: the file ends inside its head, after {len(data)} bytes") from None
    if head.height < 1 or head.width < 1:
        raise ValueError(f"expected sides of at least 1 pixel, got {head.width} x {head.height}")
    return head


def _name(data: bytes) -> str:
    known = [name for magic, name in _OTHERS.items() if data.startswith(magic)]
    return known[0] if known else f"a file that begins with {data[:8]!r}"


def _byte(data: bytes, at: int) -> int:
    if at < 0:
        raise IndexError
    return data[at]


def _number(data: bytes, at: int, size: int, order: str = "big") -> int:
    _byte(data, at + size - 1)
    return int.from_bytes(data[at : at + size], order)  # type: ignore[arg-type]


def _jpeg(data: bytes) -> ImageHead:
    at, frame, turns = 2, None, []
    while True:
        if _byte(data, at) != 0xFF:
            raise ValueError(f"corrupt: expected a JPEG marker at byte {at}, got 0x{data[at]:02x}")
        while _byte(data, at) == 0xFF:  # a marker may be filled up with 0xff
            at += 1
        marker = data[at]
        at += 1
        if marker in _BARE:
            continue
        if marker == 0xD9:
            raise ValueError("corrupt: the JPEG ends before its image")
        length = _number(data, at, 2)
        if length < 2:
            raise ValueError(f"corrupt: a JPEG segment of {length} bytes at byte {at}")
        if marker in _SOF:
            frame = (
                _number(data, at + 3, 2),
                _number(data, at + 5, 2),
                _byte(data, at + 7),
                _byte(data, at + 2),
            )
        elif marker == 0xE1 and data[at + 2 : at + 8] == b"Exif\0\0":
            turns.append(_exif_orientation(data[at + 8 : at + length]))
        elif marker == 0xDA:
            break
        at += length
    if frame is None:
        raise ValueError("corrupt: a JPEG scan before its frame header")
    # Cameras write thumbnails and padding after the image; what is missing is the end of a file that was cut.
    if data.rfind(b"\xff\xd9", at) < 0:
        raise ValueError(
            f"truncated: no end-of-image marker in the {len(data) - at} bytes after the JPEG's head"
        )
    if len(set(turns)) > 1:
        raise ValueError(f"corrupt: Exif blocks with orientations {turns}; expected one block")
    height, width, channels, bits = frame
    orientation = turns[0] if turns else 1
    if orientation >= 5:
        height, width = width, height
    return ImageHead("JPEG", height, width, channels, bits, orientation)


def _exif_orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory; 1 where there is none or the block makes no sense, as decoders take it.

    Raises:
        ValueError: a turn in a block that decoders do not agree on: its directory says that it is longer than the block, or its byte
            order is none.
    """
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(tiff[:4])
    if order is not None:
        return _orientation(tiff, order)
    for guess in ("little", "big"):
        if (value := _orientation(tiff, guess)) != 1:
            raise ValueError(f"corrupt: Exif orientation {value} in a block that begins with {tiff[:4]!r}")
    return 1


def _orientation(tiff: bytes, order: str) -> int:
    try:
        at = _number(tiff, 4, 4, order)
        end = at + 2 + 12 * _number(tiff, at, 2, order)
        for entry in range(at + 2, end, 12):
            if _number(tiff, entry, 2, order) == 0x0112:
                value = _number(tiff, entry + 8, 2, order)
                if 2 <= value <= 8 and end > len(tiff):
                    raise ValueError(
                        f"corrupt: Exif orientation {value} in a directory of {end - at} bytes where {len(tiff) - at} are left"
                    )
                return value if 1 <= value <= 8 else 1
    except IndexError:
        pass
    return 1


def _png(data: bytes) -> ImageHead:
    if data[12:16] != b"IHDR":
        raise ValueError("corrupt: expected IHDR as the PNG's first chunk")
    width, height = _number(data, 16, 4), _number(data, 20, 4)
    bits, kind = _byte(data, 24), _byte(data, 25)
    at = 8
    while True:
        if at + 12 > len(data):
            raise ValueError(f"truncated: no IEND chunk in {len(data)} bytes of PNG")
        size, name = _number(data, at, 4), data[at + 4 : at + 8]
        if name == b"IEND":
            break
        if name == b"eXIf" and (turn := _exif_orientation(data[at + 8 : at + 8 + size])) != 1:
            raise ValueError(
                f"expected a PNG without Exif orientation, got {turn}: write it anew with its pixels turned"
            )
        at += 12 + size
    if kind not in _PNG_CHANNELS:
        raise ValueError(f"corrupt: PNG colour type {kind}")
    return ImageHead("PNG", height, width, _PNG_CHANNELS[kind], bits)


def plain_png(height: int, width: int) -> bytes:
    """A black picture, 8-bit RGB.

    >>> read_head(plain_png(2, 3))
    ImageHead(format='PNG', height=2, width=3, channels=3, bits=8, orientation=1)
    """

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = zlib.compress(bytes(1 + 3 * width) * height)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
