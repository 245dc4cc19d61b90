"""Rows as they came: checked once on arrival, written where they belong, compared when they come again.

Dimension letters: n rows of a message, R elements of a row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from nearkin.v1.checksums import crc32c
from nearkin.v1.room import LINE_BYTES
from nearkin.v1.soundness import INFINITY, all_finite, zero_rows
from numpy.typing import NDArray

from nearkin_service.errors import DataLossError, InvalidArgumentError, lacking
from nearkin_service.ranges import RowSet
from nearkin_service.store.journal import Kind, Record
from nearkin_service.values import PushSpec

_SCAN_BYTES = 8 << 20
_CHECKSUM_BYTES = 512 << 10  # stays in a core's cache between being read and being summed
_LOOK_BYTES = 1 << 20  # stays there while it is received, looked at twice and written


def as_bytes(array: NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def as_rows(payload: memoryview, spec: PushSpec) -> NDArray[Any]:
    """[n, R] in the wire dtype, without a copy."""
    return np.frombuffer(payload, spec.numpy_dtype).reshape(-1, spec.row_elements)


@dataclass(frozen=True, slots=True)
class Examined:
    """What there is to know of rows.

    Attributes:
        crc: CRC32C of their bytes.
        infinite, zeros: numbers, from the first of them, of those that hold NaN or Inf, and only zeros.
    """

    crc: int
    infinite: NDArray[np.int64]
    zeros: NDArray[np.int64]

    def require(self, crc: int | None, row_start: int) -> None:
        """DataLossError: the rows are not what their sender had."""
        if crc is not None and crc != self.crc:
            raise DataLossError(
                f"the rows of the message at row {row_start} do not match its crc32c: they were damaged on "
                "the way, or changed by their owner while they were sent; send it again"
            )


class Examiner:
    """One pass over rows that come piece by piece, each in a core's cache; odd ones are seen twice."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._crc = self._count = 0
        self._infinite: list[NDArray[np.int64]] = []
        self._zeros: list[NDArray[np.int64]] = []

    def look(self, piece_nR: NDArray[Any]) -> None:
        """At the next rows."""
        self.add_up(as_bytes(piece_nR))
        odd = _odd(piece_nR, self._dtype)
        if len(odd):
            largest = _largest(piece_nR[odd])
            self._infinite.append(odd[largest >= INFINITY[self._dtype]] + self._count)
            self._zeros.append(odd[largest == 0] + self._count)
        self._count += len(piece_nR)

    def add_up(self, data: memoryview) -> None:
        """The same for rows that somebody else has looked at."""
        self._crc = crc32c(data, self._crc)

    def found(self) -> Examined:
        """In all rows so far."""
        none = np.empty(0, np.int64)
        return Examined(
            self._crc, np.concatenate([none, *self._infinite]), np.concatenate([none, *self._zeros])
        )


def examine(rows_nR: NDArray[Any], dtype: str) -> Examined:
    """What an `Examiner` finds."""
    examiner, step = Examiner(dtype), rows_at_a_time(rows_nR[:1].nbytes)
    for at in range(0, len(rows_nR), step):
        examiner.look(rows_nR[at : at + step])
    return examiner.found()


def rows_at_a_time(row_bytes: int) -> int:
    """How many stay in a core's cache."""
    return max(1, _LOOK_BYTES // max(1, row_bytes))


def _odd(rows_nR: NDArray[Any], dtype: str) -> NDArray[np.int64]:
    """Among these is every row that is not finite, and every one of zeros; most often there are none."""
    bits_nR = rows_nR.view(f"u{rows_nR.itemsize}")
    return zero_rows(bits_nR) if all_finite(bits_nR.reshape(-1), dtype) else np.arange(len(rows_nR))


def _largest(rows_nR: NDArray[Any]) -> NDArray[np.unsignedinteger[Any]]:
    """Of each row, the bit pattern of its largest absolute value; NaN is above infinity."""
    bits = rows_nR.view(f"u{rows_nR.itemsize}")
    sign = bits.dtype.type(1 << (8 * rows_nR.itemsize - 1))
    largest: NDArray[np.unsignedinteger[Any]] = (bits & ~sign).max(axis=1)
    return largest


def refuse_infinite(infinite: NDArray[np.int64], row_start: int, absent: RowSet) -> NDArray[np.int64]:
    """Those of them that are absent, to be blanked. InvalidArgumentError: one that is not."""
    if not len(infinite):
        return infinite
    wrong = infinite[~absent.contains(infinite + row_start)]
    if len(wrong):
        raise InvalidArgumentError(
            "payload", f"row {row_start + int(wrong[0])} holds NaN or Inf; nothing of this message was stored"
        )
    return infinite


def first_difference(
    mine_nR: NDArray[Any], theirs_nR: NDArray[Any], start: int, absent: RowSet
) -> int | None:
    """The first row whose bytes differ; absent rows may."""
    mine, theirs = mine_nR.view(np.uint8), theirs_nR.view(np.uint8)
    if np.array_equal(mine, theirs):
        return None
    differing = np.flatnonzero((mine != theirs).any(axis=1)) + start
    differing = differing[~absent.contains(differing)]
    return int(differing[0]) if len(differing) else None


class RowsFile:
    """`rows.bin`: rows on end, in the wire dtype, the last of which ends the file. Any number of threads.

    Attributes:
        rows_at: the byte where row 0 begins, 0 to 63.
    """

    def __init__(self, path: Path, spec: PushSpec, *, writable: bool = False) -> None:
        self.path = path
        self._spec = spec
        self._descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        self.rows_at = begins_at(os.fstat(self._descriptor).st_size, spec) or 0
        self._seen: NDArray[Any] | None = None  # kept: giving a mapping up interrupts every thread

    def write(self, start: int, data: memoryview, crc: int | None = None) -> Record:
        """Stores whole rows (their CRC32C is `crc`, if known); returns what the journal is to say of them."""
        self.put(start, data)
        checksum = crc32c(data) if crc is None else crc
        return Record(Kind.ROWS, start, data.nbytes // self._spec.row_bytes, checksum)

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode, by which others see whether they have the same file at its path."""
        found = os.fstat(self._descriptor)
        return found.st_dev, found.st_ino

    def offset(self, row: int) -> int:
        """The byte where a row begins."""
        return self.rows_at + row * self._spec.row_bytes

    def put(self, start: int, data: memoryview) -> None:
        """Writes whole rows, of which nobody is told."""
        try:
            _pwrite_all(self._descriptor, data, self.offset(start))
        except OSError as error:
            raise lacking(error) or error from error

    def blank(self, start: int, count: int) -> None:
        """Zeroes rows."""
        nothing, end = bytes(min(_SCAN_BYTES, count * self._spec.row_bytes)), self.offset(start + count)
        try:
            for at in range(self.offset(start), end, len(nothing)):
                _pwrite_all(self._descriptor, memoryview(nothing)[: end - at], at)
        except OSError as error:
            raise lacking(error) or error from error

    def read(self, start: int, count: int) -> NDArray[Any]:
        """[count, R]. DataLossError: the file ends before."""
        row_bytes = self._spec.row_bytes
        data = os.pread(self._descriptor, count * row_bytes, self.offset(start))
        if len(data) != count * row_bytes:
            raise DataLossError(f"row {start + len(data) // row_bytes} is missing from rows.bin")
        return as_rows(memoryview(data), self._spec)

    def compare(self, start: int, rows_nR: NDArray[Any], absent: RowSet) -> int | None:
        """The first row that is stored with other bytes than given."""
        step = max(1, _SCAN_BYTES // self._spec.row_bytes)
        for at in range(0, len(rows_nR), step):
            theirs = rows_nR[at : at + step]
            found = first_difference(self.read(start + at, len(theirs)), theirs, start + at, absent)
            if found is not None:
                return found
        return None

    def blocks(self, start: int, count: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """These rows in pieces of some megabytes, each with the number of its first row."""
        step = max(1, _SCAN_BYTES // self._spec.row_bytes)
        for at in range(start, start + count, step):
            yield at, self.read(at, min(step, start + count - at))

    def checksum(self, start: int, count: int) -> int:
        """CRC32C of these rows, as they lie in the file."""
        buffer, crc = memoryview(bytearray(_CHECKSUM_BYTES)), 0
        at, end = self.offset(start), self.offset(start + count)
        while at < end:
            got = os.preadv(self._descriptor, [buffer[: end - at]], at)
            if not got:
                row = (at - self.rows_at) // self._spec.row_bytes
                raise DataLossError(f"row {row} is missing from rows.bin")
            crc = crc32c(buffer[:got], crc)
            at += got
        return crc

    def examine(self, start: int, count: int) -> Examined:
        """Of rows where they lie: half the cost of reading them. DataLossError: the file is cut short."""
        if os.fstat(self._descriptor).st_size != self.offset(self._spec.num_classes):
            raise DataLossError("rows.bin was cut short")
        if self._seen is None:
            self._seen = self.map()
        return examine(self._seen[start : start + count], self._spec.dtype)

    def matches(self, record: Record) -> bool:
        """Whether the rows are still those that a journal record spoke of."""
        try:
            return self.checksum(record.start, record.count) == record.crc
        except (DataLossError, OSError):
            return False

    def map(self) -> NDArray[Any]:
        """[N, R], mapped read-only. DataLossError: the file is cut short."""
        shape = (self._spec.num_classes, self._spec.row_elements)
        with open(self._descriptor, "rb", closefd=False) as file:  # what became of its name does not matter
            return mapped(file, self.path.name, self._spec.numpy_dtype, shape, self.rows_at)

    def close(self) -> None:
        self._seen = None
        os.close(self._descriptor)


def begins_at(file_bytes: int, spec: PushSpec) -> int | None:
    """Where row 0 begins in a `rows.bin` of this size; None: it cannot be all there."""
    before = file_bytes - spec.rows_bytes
    return before if 0 <= before < LINE_BYTES else None


def mapped(file: BinaryIO, name: str, dtype: Any, shape: tuple[int, int], begins: int = 0) -> NDArray[Any]:
    """A file as an array, from byte `begins` on, mapped read-only. DataLossError: it is shorter than that."""
    try:
        return np.memmap(file, dtype, mode="r", offset=begins, shape=shape)
    except ValueError as error:
        raise DataLossError(f"{name} was cut short while the service ran") from error


def _pwrite_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
