"""Shared memory on one host: rows go through a file that the service lends, tables come as files to map.

The service makes and removes everything; a client that dies leaves nothing behind. Rows are copied straight
into a place of the lent file, from NumPy or torch with that one copy. The 8 bytes before a place belong to
it: the client sets them when it hands the place over, the service clears them once it has copied the rows
out.
"""

from __future__ import annotations

import logging
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from crc32c import crc32c
from nearkin.v1 import bulk
from nearkin.v1 import neighbours_pb2 as pb
from numpy.typing import NDArray

from nearkin_client.arrays import Rows
from nearkin_client.channel import Endpoint
from nearkin_client.errors import FailedPrecondition

log = logging.getLogger("nearkin.client.shared")

_PAGE = 4096
_FLAG = np.dtype("<i8")
_PAUSE_SECONDS = 0.00005


@dataclass(frozen=True, slots=True)
class Source:
    """One rank's rows; the first is that of class `row_start`."""

    rows: Rows
    row_start: int


def lent(
    begun: pb.BeginPushResponse,
    source: Source,
    place_bytes: int,
    wanted: Literal["auto"] | bool,
    endpoint: Endpoint,
) -> SharedRows | None:
    """What the rows of a push go through, or None for the connection; says at INFO which and why.

    FailedPrecondition: shared memory is `wanted` (True) and cannot be had.
    """
    if wanted is False:
        return None
    try:
        _require_offer(begun, endpoint)
        shared = SharedRows(begun, source, place_bytes)
    except (OSError, ValueError) as error:
        if wanted is True:
            raise FailedPrecondition(f"shared_memory=True: {error}", field="shared_memory") from error
        log.info("epoch %d: rows go through the connection (%s)", begun.push.epoch, error)
        return None
    log.info("epoch %d: rows go through shared memory", begun.push.epoch)
    return shared


def _require_offer(begun: pb.BeginPushResponse, endpoint: Endpoint) -> None:
    if not endpoint.is_local:
        raise ValueError(f"{endpoint.address} is no unix socket")
    if not begun.HasField("shared_memory"):
        raise ValueError("the service offers no shared memory")


class SharedRows:
    """A lent file, cut into places of equal size that are filled in turn."""

    def __init__(self, begun: pb.BeginPushResponse, source: Source, place_bytes: int) -> None:
        """OSError: the file cannot be opened here. ValueError: it is not what was offered, or too small."""
        offer = begun.shared_memory
        self._push_id, self._segment, self._source = begun.push.push_id, offer.segment, source
        self._stride = -(-place_bytes // _PAGE) * _PAGE + _PAGE
        self._places = offer.size // self._stride
        if not self._places:
            raise ValueError(f"{offer.size} bytes hold no message of {place_bytes}")
        self._bytes: NDArray[np.uint8] = np.frombuffer(_mapped(offer), np.uint8)
        self._next = 0

    def message(self, start: int, stop: int, over: Callable[[], bool]) -> bulk.WriteRows | None:
        """Copies the rows of classes start..stop-1 into the next place; the message that says so.

        `over` says whether the stream has ended, so that nobody would free a place any more: None then.
        """
        begin = self._next * self._stride + _PAGE
        self._next = (self._next + 1) % self._places
        flag = self._bytes[begin - _FLAG.itemsize : begin].view(_FLAG)
        while flag[0]:
            if over():
                return None
            time.sleep(_PAUSE_SECONDS)
        rows, first = self._source.rows, start - self._source.row_start
        place = self._bytes[begin : begin + (stop - start) * rows.row_bytes]
        rows.copy_into(place, first, first + stop - start)
        flag[0] = 1
        return bulk.WriteRows(
            push_id=self._push_id,
            row_start=start,
            shared_row_count=stop - start,
            segment=self._segment,
            segment_offset=begin,
            crc32c=crc32c(place.data),
            payload=memoryview(b""),
        )


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


def _mapped(offer: pb.SharedMemory) -> Any:
    descriptor = os.open(offer.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        size = os.fstat(descriptor).st_size
        if size != offer.size:
            raise ValueError(f"{offer.path} has {size} bytes, not {offer.size}")
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
