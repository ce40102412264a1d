"""read_head: sides, channels and turn of whole files; anything else is a ValueError that says what came."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ikd_fast.dali.header import PNG, ImageHead, read_head
from tests.dali.files import (
    JPEG_ENDS,
    bad_check_sum,
    bad_tables,
    chunk,
    cv2_file,
    decoded,
    exif,
    interlaced,
    picture,
    png,
    save,
    scan_start,
    with_blocks,
)

IMAGE = picture(19, 31)
JPEG = save(IMAGE)
THUMBNAIL = save(picture(8, 8))

KINDS = {
    "baseline": (JPEG, (3, 8)),
    "progressive": (save(IMAGE, progressive=True), (3, 8)),
    "grey": (save(IMAGE, mode="L"), (1, 8)),
    "CMYK": (save(IMAGE, mode="CMYK"), (4, 8)),
    "restart markers": (save(IMAGE, restart_marker_blocks=1), (3, 8)),
    "a marker filled up": (JPEG[:2] + b"\xff\xff\xff" + JPEG[2:], (3, 8)),
    "a thumbnail before it": (with_blocks(JPEG, b"\0" + THUMBNAIL), (3, 8)),
    "a picture after it": (JPEG + THUMBNAIL, (3, 8)),
    "padding after it": (JPEG + bytes(100), (3, 8)),
    "PNG": (save(IMAGE, "PNG"), (3, 8)),
    "PNG, grey": (save(IMAGE, "PNG", "L"), (1, 8)),
    "PNG, grey and alpha": (save(IMAGE, "PNG", "LA"), (2, 8)),
    "PNG, alpha": (save(IMAGE, "PNG", "RGBA"), (4, 8)),
    "PNG, palette": (save(IMAGE, "PNG", "P"), (1, 8)),
    "PNG, 1 bit": (save(IMAGE, "PNG", "1"), (1, 1)),
    "PNG, 16 bits": (cv2_file(IMAGE.astype(np.uint16) * 257), (3, 16)),
    "PNG, interlaced": (interlaced(IMAGE), (3, 8)),
}
WHOLE = [data for data, _ in KINDS.values()]


@pytest.mark.parametrize("kind", KINDS)
def test_sides_are_those_of_the_decoder(kind: str) -> None:
    data, (channels, bits) = KINDS[kind]
    head = read_head(data)
    assert (head.height, head.width) == decoded(data).shape[:2] == (19, 31)
    assert (head.channels, head.bits, head.orientation) == (channels, bits, 1)
    assert head.format == ("PNG" if kind.startswith("PNG") else "JPEG")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("orientation", range(10))
def test_the_turn_that_exif_asks_for(orientation: int, order: str, kind: int) -> None:
    """0 and 9 mean nothing; neither does a LONG in big-endian order, of which decoders read the first half."""
    data = with_blocks(JPEG, exif(orientation, order, kind))
    head = read_head(data)
    assert (head.height, head.width) == decoded(data).shape[:2]
    if kind == 3:
        assert head.orientation == (orientation if 1 <= orientation <= 8 else 1)
        assert (head.height, head.width) == ((31, 19) if 5 <= orientation <= 8 else (19, 31))


@pytest.mark.parametrize(
    ("data", "orientation"),
    [
        (with_blocks(JPEG, b"http://ns.adobe.com/xap/1.0/\0<x/>", exif(6)), 6),
        (with_blocks(JPEG, exif(6), exif(6)), 6),
        (with_blocks(JPEG, exif(6), marker=0xE2), 1),
        (with_blocks(JPEG, b"Exif\0\0"), 1),
        (with_blocks(JPEG, b"Exif\0\0II*\0\xff\xff\xff\xff"), 1),
        (with_blocks(JPEG, exif(6)[:-14]), 1),
        (with_blocks(JPEG, b"Exif\0\0junk"), 1),
    ],
)
def test_where_the_turn_is_looked_for(data: bytes, orientation: int) -> None:
    assert read_head(data).orientation == orientation
    assert (read_head(data).height, read_head(data).width) == decoded(data).shape[:2]


REFUSED = {
    "empty": (b"", "got an empty file"),
    "GIF": (b"GIF89a" + bytes(20), "expected JPEG or PNG, got GIF"),
    "TIFF": (save(IMAGE, "TIFF"), "got TIFF"),
    "BMP": (save(IMAGE, "BMP"), "got BMP"),
    "WebP": (b"RIFF\x10\0\0\0WEBP", "got WebP"),
    "text": (b"<html>404</html>", r"begins with b'<html>40'"),
    "no end marker": (JPEG[: -len(JPEG_ENDS)], r"truncated: no end-of-image marker in the \d+ bytes"),
    "half of it": (JPEG[: len(JPEG) // 2], "truncated"),
    "nothing but its start": (JPEG[:2], "truncated: .*inside its head, after 2 bytes"),
    "a thumbnail, cut after it": (with_blocks(JPEG, b"\0" + THUMBNAIL)[: len(THUMBNAIL) + 40], "truncated"),
    "ends before its image": (JPEG[:2] + JPEG_ENDS, "the JPEG ends before its image"),
    "a scan without a frame": (JPEG[:2] + JPEG[JPEG.index(b"\xff\xda") :], "a JPEG scan before its frame"),
    "junk between segments": (JPEG[:20] + b"abc" + JPEG[20:], "expected a JPEG marker at byte 20, got 0x61"),
    "a segment of no length": (JPEG[:2] + b"\xff\xe1\0\0" + JPEG[2:], "a JPEG segment of 0 bytes at byte 4"),
    "height 0": (
        (lambda at: JPEG[: at + 5] + b"\0\0" + JPEG[at + 7 :])(JPEG.index(b"\xff\xc0")),
        "got 31 x 0",
    ),
    "two turns": (with_blocks(JPEG, exif(6), exif(3)), r"Exif blocks with orientations \[6, 3\]"),
    "a turn in no byte order": (
        with_blocks(JPEG, exif(6).replace(b"II*", b"IM*")),
        r"Exif orientation 6 in a block that begins with b'IM\*\\x00'",
    ),
    "a turn in a cut directory": (with_blocks(JPEG, exif(6, entries=9)), "Exif orientation 6 in a directory"),
    "PNG without an end": (save(IMAGE, "PNG")[:-12], "truncated: no IEND chunk"),
    "interlaced PNG, cut": (interlaced(IMAGE)[:90], "truncated: no IEND chunk in 90 bytes"),
    "PNG, its signature only": (PNG, "IHDR"),
    "PNG of another order": (PNG + chunk(b"IDAT", b"") + chunk(b"IEND", b""), "expected IHDR as the PNG's first"),
    "PNG of no width": (png(0, 9, 8, 2), "got 0 x 9"),
    "PNG of colour type 5": (png(9, 9, 8, 5), "PNG colour type 5"),
    "PNG with a turn": (png(9, 9, 8, 2, b"", chunk(b"eXIf", exif(6)[6:])), "a PNG without Exif orientation, got 6"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_and_why(kind: str) -> None:
    data, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as caught:
        read_head(data)
    assert "\n" not in str(caught.value)


def test_a_png_that_says_it_is_upright() -> None:
    assert read_head(png(9, 7, 8, 2, b"", chunk(b"eXIf", exif(1)[6:]))) == ImageHead("PNG", 7, 9, 3, 8)


def test_what_only_a_decoder_notices() -> None:
    """These reach DALI: their heads are in order."""
    for data in (bad_tables(JPEG), bad_check_sum(save(IMAGE, "PNG"))):
        assert decoded(data) is None
        assert (read_head(data).height, read_head(data).width) == (19, 31)


@pytest.mark.parametrize("data", WHOLE[:1] + WHOLE[1:2] + WHOLE[-1:], ids=["JPEG", "progressive", "PNG"])
def test_cut_anywhere(data: bytes) -> None:
    for length in range(len(data)):
        with pytest.raises(ValueError, match="truncated|empty file|corrupt|expected JPEG or PNG"):
            read_head(data[:length])


def test_markers_inside_the_scan_are_no_segments() -> None:
    at = scan_start(JPEG)
    assert read_head(JPEG[:at] + b"\xff\xd0\xff\x00\xff\xd7" + JPEG[at:]).width == 31


def head_or_value_error(data: bytes) -> None:
    """Any other exception fails the test."""
    try:
        head = read_head(data)
    except ValueError:
        return
    assert min(head.height, head.width) >= 1
    assert 1 <= head.orientation <= 8


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\xff\xd8", PNG, b"\xff\xd8\xff\xe1\x00\x40Exif\0\0II*\0"]),
)
def test_any_bytes(tail: bytes, start: bytes) -> None:
    head_or_value_error(start + tail)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from([*WHOLE, with_blocks(JPEG, exif(6)), with_blocks(JPEG, exif(5, ">"))]),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, 5000),
)
def test_files_with_bytes_changed_and_an_end_cut_off(
    data: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    mutable = bytearray(data)
    for at, value in changes:
        mutable[at % len(data)] = value
    head_or_value_error(bytes(mutable))
    head_or_value_error(bytes(mutable[: cut % len(data)]))
