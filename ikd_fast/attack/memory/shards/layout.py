"""The bytes of a shard: its head, its index, and records in slots of :data:`UNIT` bytes.

::

    0            head: magic, version, capacity, number of this shard and of all, CRC-32 of these; then ``end``
    4096         index: ``capacity`` entries of two little-endian uint64, (id, place)
    data_start   slots: head of a record, delta, velocity, padding

A place is the slot's first unit << 24 | its number of units; 0 for an entry that nothing was ever put in.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from ikd_fast.attack.memory.record import Record

MAGIC, VERSION = b"IKDSHARD", 1
UNIT, HEAD_BYTES, ENTRY_BYTES = 512, 4096, 16
MAX_UNITS = (1 << 24) - 1
END_AT = 64
"""Offset in the head of ``end``, uint64: the first byte after the last slot ever given out."""
_HEAD = struct.Struct("<8sIIII")
_RECORD = struct.Struct("<4sIQIIIIqQQ")
_RECORD_MAGIC = b"IKDR"
RECORD_HEAD = 64


class Unreadable(ValueError):
    """A shard or a record that is not what its head says, or has none."""


@dataclass(frozen=True)
class ShardHead:
    """Of a shard: entries of its index, which of how many shards it is."""

    capacity: int
    number: int
    shards: int

    @property
    def data_start(self) -> int:
        """Offset of the first slot, bytes."""
        return HEAD_BYTES + -(-self.capacity * ENTRY_BYTES // HEAD_BYTES) * HEAD_BYTES

    def encode(self) -> bytes:
        body = _HEAD.pack(MAGIC, VERSION, self.capacity, self.number, self.shards)
        return body + struct.pack("<I", zlib.crc32(body))

    @classmethod
    def decode(cls, data: bytes) -> ShardHead:
        """Raises:
        Unreadable: another kind of file, another version, damaged.
        """
        length = _HEAD.size
        if len(data) < length + 4 or data[:8] != MAGIC:
            raise Unreadable("no shard of a perturbation memory")
        magic, version, capacity, number, shards = _HEAD.unpack_from(data)
        if version != VERSION:
            raise Unreadable(f"format version {version}, expected {VERSION}")
        if struct.unpack_from("<I", data, length)[0] != zlib.crc32(data[:length]):
            raise Unreadable("its head is damaged")
        return cls(capacity, number, shards)


@dataclass(frozen=True)
class Entry:
    """Of a record, without its contents: image, canonical (H, W), visits, the step that wrote it, bytes of its slot."""

    id: int
    size: tuple[int, int]
    visits: int
    step: int
    nbytes: int


def units_of(nbytes: int) -> int:
    """Units that so many bytes take."""
    return -(-nbytes // UNIT)


def place_of(unit: int, units: int) -> int:
    """Raises:
    ValueError: a record of more than 8 GiB.
    """
    if units > MAX_UNITS:
        raise ValueError(f"a record may take {MAX_UNITS * UNIT} bytes, this one takes {units * UNIT}")
    return unit << 24 | units


def slot_of(place: int) -> tuple[int, int]:
    """(first unit, units) of a place."""
    return place >> 24, place & MAX_UNITS


def encode_record(id: int, record: Record) -> bytes:
    """Head and contents; the CRC-32 in the head is of all the rest."""
    delta = record.delta.detach().cpu().contiguous().numpy().tobytes()
    velocity = (
        b"" if record.velocity is None else record.velocity.detach().cpu().contiguous().numpy().tobytes()
    )
    shape = (0, 0) if record.velocity is None else tuple(record.velocity.shape[1:])
    channels = 0 if record.velocity is None else record.velocity.shape[0]
    height, width = record.size
    fields = (id, height, width, record.visits, channels, record.step, len(delta), len(velocity))
    body = _RECORD.pack(_RECORD_MAGIC, 0, *fields) + struct.pack("<HH", *shape)
    body += bytes(RECORD_HEAD - len(body))
    crc = zlib.crc32(velocity, zlib.crc32(delta, zlib.crc32(body)))
    return b"".join((body[:4], struct.pack("<I", crc), body[8:], delta, velocity))


def decode_entry(id: int, data: bytes, nbytes: int) -> Entry:
    """From the first :data:`RECORD_HEAD` bytes of a slot of ``nbytes``.

    Raises:
        Unreadable: another image's, or none.
    """
    if len(data) < RECORD_HEAD:
        raise Unreadable("cut short")
    magic, _, there, height, width, visits, _, step, _, _ = _RECORD.unpack_from(data)
    if magic != _RECORD_MAGIC or there != id:
        raise Unreadable("no record of this image")
    return Entry(id, (height, width), visits, step, nbytes)


def decode_record(id: int, data: bytes | bytearray) -> Record:
    """The record in a slot; tensors are on the CPU and writable.

    Raises:
        Unreadable: another image's, cut short, or the CRC-32 differs: it was never finished, or damaged.
    """
    if len(data) < RECORD_HEAD:
        raise Unreadable("cut short")
    magic, crc, there, height, width, visits, channels, step, ndelta, nvelocity = _RECORD.unpack_from(data)
    if magic != _RECORD_MAGIC or there != id:
        raise Unreadable("no record of this image")
    end = RECORD_HEAD + ndelta + nvelocity
    if end > len(data):
        raise Unreadable("cut short")
    view = memoryview(data)
    found = zlib.crc32(view[8:end], zlib.crc32(bytes(4), zlib.crc32(view[:4])))
    if found != crc:
        raise Unreadable("its checksum differs")
    delta = torch.from_numpy(np.frombuffer(view, np.uint8, ndelta, RECORD_HEAD).copy())
    velocity = None
    if nvelocity:
        shape = (channels, *struct.unpack_from("<HH", data, _RECORD.size))
        flat = np.frombuffer(view, np.float16, nvelocity // 2, RECORD_HEAD + ndelta)
        velocity = torch.from_numpy(flat.copy()).view(shape)
    return Record((height, width), visits, step, delta, velocity)
