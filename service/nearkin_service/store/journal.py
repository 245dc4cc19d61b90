"""What has happened to a push, as fixed-size records at the end of a file.

One record is 32 bytes, little-endian: kind u32, crc u32, start i64, count i64, reserved u32 = 0, crc32c
of the 28 bytes before it u32. `crc` is the CRC32C of the rows' bytes in `rows.bin` (ROWS only). A record is
written after the bytes it speaks of, in one write: a torn tail means rows sent again, never wrong rows.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
from nearkin.v1.checksums import crc32c, followed_by, of_zeros
from numpy.typing import NDArray

from nearkin_service.ranges import RowRange, RowSet
from nearkin_service.values import MAX_INT32

_FIELDS = struct.Struct("<IIqqI")
_CHECKSUM = struct.Struct("<I")
RECORD_BYTES = _FIELDS.size + _CHECKSUM.size
_RECORD = np.dtype(
    [
        ("kind", "<u4"),
        ("crc", "<u4"),
        ("start", "<i8"),
        ("count", "<i8"),
        ("none", "<u4"),
        ("checksum", "<u4"),
    ]
)
_RECORDS_AT_ONCE = 1 << 15
_CRC_TABLE = np.arange(256, dtype=np.uint32)
for _ in range(8):
    _CRC_TABLE = (_CRC_TABLE >> np.uint32(1)) ^ np.where(_CRC_TABLE & 1, np.uint32(0x82F63B78), np.uint32(0))


class Kind(IntEnum):
    ROWS = 1  # these rows are in rows.bin
    ZERO = 2  # these rows arrived and hold nothing but zeros
    ABSENT = 3  # these classes have no embedding
    AUTOCOMMIT = 4  # commit as soon as the last row is in; of some rows: once all are vouched for like these
    COMMITTED = 5  # closed: to be built


_KINDS = frozenset(map(int, Kind))


@dataclass(frozen=True, slots=True)
class Record:
    kind: Kind
    start: int = 0
    count: int = 0
    crc: int = 0

    def packed(self) -> bytes:
        head = _FIELDS.pack(self.kind, self.crc, self.start, self.count, 0)
        return head + _CHECKSUM.pack(crc32c(head))


def append(descriptor: int, records: Iterable[Record]) -> None:
    """Adds records in one write to a file opened with O_APPEND."""
    append_packed(descriptor, b"".join(record.packed() for record in records))


def append_packed(descriptor: int, data: bytes) -> None:
    """The same for what `packed` has made."""
    written = 0
    try:
        while written < len(data):
            written += os.write(descriptor, data[written:])
    except OSError:
        os.truncate(descriptor, os.fstat(descriptor).st_size - written)
        raise


def read(path: Path) -> tuple[list[Record], int]:
    """The records up to the first damaged one, and how many bytes they are."""
    data = path.read_bytes()
    records: list[Record] = []
    for at in range(0, len(data) - RECORD_BYTES + 1, RECORD_BYTES):
        record = _unpack(data[at : at + RECORD_BYTES])
        if record is None:
            break
        records.append(record)
    return records, len(records) * RECORD_BYTES


def _unpack(data: bytes) -> Record | None:
    kind, crc, start, count, _reserved = _FIELDS.unpack_from(data)
    (checksum,) = _CHECKSUM.unpack_from(data, _FIELDS.size)
    if checksum != crc32c(data[: _FIELDS.size]) or kind not in _KINDS:
        return None
    sound = start >= 0 and count >= 0 and start + count <= MAX_INT32
    return Record(Kind(kind), start, count, crc) if sound else None


def checksum(path: Path, rows: RowRange, row_bytes: int, read_again: Callable[[RowRange], int]) -> int:
    """CRC32C over these rows in order, put together from those of the records; rows of no record are zeros.

    `read_again`: that of rows whose record goes beyond `rows`.
    """
    crc, at = 0, rows.start
    for record in [*_arrived(path, rows), Record(Kind.ROWS, rows.stop)]:
        within = RowRange(max(record.start, rows.start), min(record.start + record.count, rows.stop))
        part = record.crc if len(within) == record.count else read_again(within)
        gap = (within.start - at) * row_bytes
        crc = followed_by(crc, of_zeros(gap), gap)
        crc = followed_by(crc, part, len(within) * row_bytes)
        at = within.stop
    return crc


def _arrived(path: Path, rows: RowRange) -> list[Record]:
    """The records of any of these rows, in their order. Looks at no other: there may be many."""
    data = path.read_bytes()
    records = np.frombuffer(data, _RECORD, len(data) // RECORD_BYTES)
    starts, stops = records["start"], records["start"] + records["count"]
    chosen = records[(records["kind"] == Kind.ROWS) & (starts < rows.stop) & (stops > rows.start)]
    found = [_unpack(record.tobytes()) for record in np.sort(chosen, order="start")]
    return [record for record in found if record is not None]


def row_set(records: Iterable[Record], kind: Kind) -> RowSet:
    """The rows that records of one kind name."""
    chosen = [(r.start, r.start + r.count) for r in records if r.kind is kind]
    starts, stops = np.array(chosen, np.int64).reshape(-1, 2).T
    return RowSet.from_arrays(starts, stops)


def records_of(kind: Kind, rows: RowSet) -> list[Record]:
    """One record for each range."""
    return [Record(kind, r.start, len(r)) for r in rows]


def packed(kind: Kind, rows: RowSet) -> bytes:
    """Those records as they are written: there may be millions."""
    records = np.zeros(rows.ranges, _RECORD)
    records["kind"], records["start"], records["count"] = kind, rows.starts, rows.stops - rows.starts
    for at in range(0, len(records), _RECORDS_AT_ONCE):
        piece = records[at : at + _RECORDS_AT_ONCE]
        piece["checksum"] = checksums(piece.view(np.uint8).reshape(len(piece), -1)[:, : _FIELDS.size])
    return records.tobytes()


def checksums(lines_NB: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """CRC32C of each line; bytewise, as the checksum's table is defined."""
    found = np.full(len(lines_NB), 0xFFFFFFFF, np.uint32)
    for column in lines_NB.T:
        found = _CRC_TABLE[(found ^ column) & 0xFF] ^ (found >> np.uint32(8))
    return ~found
