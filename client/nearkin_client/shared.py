"""Shared memory on one host: rows are written where the service keeps them, tables come as files to map.

The service makes and removes everything, and lends each caller the rows it is going to send; a client
that dies leaves nothing behind.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from nearkin.v1 import bulk
from nearkin.v1 import neighbours_pb2 as pb
from nearkin.v1.checksums import crc32c, followed_by
from nearkin.v1.room import BEGINNINGS, LINE_BYTES, Room, address, agrees
from numpy.typing import NDArray

from nearkin_client.arrays import Rows, sound
from nearkin_client.errors import FailedPrecondition
from nearkin_client.ranges import Range
from nearkin_client.wire import Wire

log = logging.getLogger("nearkin.client.shared")

T = TypeVar("T")
_WRITERS = min(4, os.cpu_count() or 1)


def lent(
    begun: pb.BeginPushResponse,
    rows: Rows,
    row_start: int,
    wanted: Literal["auto"] | bool,
    wire: Wire,
) -> LentRows | None:
    """What the rows of a push are written into, or None for the connection; says at INFO which and why.

    FailedPrecondition: shared memory is `wanted` (True) and cannot be had.
    """
    if wanted is False:
        return None
    if begun.HasField("lent_rows") and not begun.lent_rows.loan:
        log.info("epoch %d: rows go through the connection (some have been sent before)", begun.push.epoch)
        return None
    try:
        _require_offer(begun, wire)
        _require_same_file(begun.lent_rows)
        descriptor = os.open(begun.lent_rows.path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (OSError, ValueError) as error:
        if wanted is True:
            raise not_shared(error) from error
        log.info("epoch %d: rows go through the connection (%s)", begun.push.epoch, error)
        return None
    log.info("epoch %d: rows go through shared memory", begun.push.epoch)
    return LentRows(begun, rows, row_start, descriptor)


def best_begin(rows: Rows, row_start: int) -> int:
    """The byte at which row 0 of a file had best begin: there the kernel copies these rows the quickest."""
    if not rows.in_place or not rows.count:
        return 0
    begin = (address(rows.payload(0, 1)) - row_start * rows.row_bytes) % LINE_BYTES
    return begin if begin in BEGINNINGS else 0


def not_shared(why: Exception) -> FailedPrecondition:
    """What is raised where shared memory must be used and cannot be had."""
    text = f'shared_memory=True: {why}; "auto" goes through the connection where it must'
    return FailedPrecondition(text, field="shared_memory")


def _require_offer(begun: pb.BeginPushResponse, wire: Wire) -> None:
    require_this_host(wire, begun.bulk_lane)
    if not begun.HasField("lent_rows"):
        raise ValueError("the service lends us no rows")


def _require_same_file(offer: pb.LentRows) -> None:
    """OSError, ValueError: the service's path does not lead to its file here.

    Before it is opened, as an overlay makes a copy then.
    """
    found = Path(offer.path).stat(follow_symlinks=False)
    if offer.inode and (found.st_dev, found.st_ino) != (offer.device, offer.inode):
        raise ValueError(f"{offer.path} is another file here than the service's")


def require_this_host(wire: Wire, offer: pb.BulkLane) -> None:
    """ValueError: who offers this lane is not on it, as far as we can tell; their files are not ours."""
    if why := wire.elsewhere(offer):
        raise ValueError(f"{wire.endpoint.address} cannot be shown to lead to this host: {why}")


class LentRows:
    """Rows of one push that are ours to write in place."""

    def __init__(self, begun: pb.BeginPushResponse, rows: Rows, row_start: int, descriptor: int) -> None:
        self._push_id, self._path = begun.push.push_id, begun.lent_rows.path
        self._loan = begun.lent_rows.loan
        self._rows, self._row_start, self._rows_at = rows, row_start, begun.lent_rows.rows_at
        self._file: _Open | None = _Open(descriptor)
        self._bench = _Bench()

    def write(self, start: int, stop: int) -> bulk.WriteRows:
        """Writes the rows of classes start..stop-1; the message that says so. OSError: the disk is full."""
        at, crc, all_sound = self._rows_at + start * self._rows.row_bytes, 0, True
        for given in self._rows.pieces(start - self._row_start, stop - self._row_start):
            piece = self._bench.alike(given, at)
            # Writing comes last: one thread at a time can, and is quicker with what is in the cache.
            crc = crc32c(piece, crc)
            all_sound = all_sound and sound(piece, self._rows)
            _write_all(self._still_open(), piece, at)
            at += len(piece)
        return bulk.WriteRows(
            push_id=self._push_id,
            row_start=start,
            shared_row_count=stop - start,
            loan=self._loan,
            crc32c=crc,
            sound=all_sound,
            payload=memoryview(b""),
        )

    def renewed(self, begun: pb.BeginPushResponse, wire: Wire) -> bool:
        """Goes on with the loan of an answer that came later, if it is one of the same file."""
        offer = begun.lent_rows
        if not offer.loan or (begun.push.push_id, offer.path) != (self._push_id, self._path):
            return False
        try:
            _require_offer(begun, wire)
            _require_same_file(offer)
        except (OSError, ValueError):
            return False
        self._loan = offer.loan
        return True

    def _still_open(self) -> _Open:
        if self._file is None:
            raise OSError(errno.EBADF, "these rows are not written in place any more")
        return self._file

    def close(self) -> None:
        """Nothing is begun any more; what threads are just writing is written. Idempotent."""
        self._file = None


class _Open:
    """An open file, closed once nobody holds this.

    A thread may still write when its push has ended, and the number of a closed file is the next file's.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class _Bench(threading.local):
    """Memory of each thread's own to lay a piece out in."""

    def __init__(self) -> None:
        self._room = Room()

    def alike(self, piece: memoryview, at: int) -> memoryview:
        """The same bytes, at an address that agrees with `at`, their place in the file.

        To lay them out, while they come from memory, takes less than the kernel loses otherwise.
        """
        if agrees(piece, at):
            return piece
        laid_out = self._room.of(len(piece), at)
        np.copyto(np.frombuffer(laid_out, np.uint8), np.frombuffer(piece, np.uint8))
        return laid_out


def _write_all(file: _Open, data: memoryview, offset: int) -> None:
    done = os.pwrite(file.descriptor, data, offset)
    while done < len(data):
        done += os.pwrite(file.descriptor, data[done:], offset + done)


def in_advance(make: Callable[[Range], T], pieces: Iterable[Range]) -> Iterator[T]:
    """`map`, on threads that are a little ahead: writing and summing leave the GIL."""
    ahead: deque[Future[T]] = deque()
    writers = ThreadPoolExecutor(_WRITERS, "nearkin-write")
    try:
        for piece in pieces:
            ahead.append(writers.submit(make, piece))
            if len(ahead) > _WRITERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        writers.shutdown(wait=False, cancel_futures=True)  # one of them may be who drops what is left of this


def joined(messages: Iterable[bulk.WriteRows], row_bytes: int, most_rows: int) -> Iterator[bulk.WriteRows]:
    """Messages of rows in place, those that follow each other as one: each costs both ends a millisecond."""
    last: bulk.WriteRows | None = None
    for each in messages:
        if last is None:
            last = each
            continue
        count = last.shared_row_count + each.shared_row_count
        follows = each.row_start == last.row_start + last.shared_row_count and each.sound == last.sound
        if follows and each.shared_row_count and count <= most_rows:
            assert last.crc32c is not None and each.crc32c is not None  # noqa: PT018
            crc = followed_by(last.crc32c, each.crc32c, each.shared_row_count * row_bytes)
            last = replace(last, shared_row_count=count, crc32c=crc)
        else:
            yield last
            last = each
    if last is not None:
        yield last


def map_table(path: str, shape: tuple[int, int], dtype: str) -> NDArray[Any]:
    """A column of a table, read-only, one copy for all its readers. OSError, ValueError: it cannot be had."""
    if not path:
        raise ValueError("the service offers no files to map")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        size, expected = os.fstat(descriptor).st_size, 4 * shape[0] * shape[1]
        if size != expected:
            raise ValueError(f"{path} has {size} bytes, not {expected}")
        return np.frombuffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ), dtype).reshape(shape)
    finally:
        os.close(descriptor)
