"""Rows that come in over the bulk lane, a piece at a time: written where they belong, or compared.

A message holds its rows from its first byte on: who sends the same ones waits for it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import DecodeError
from nearkin.v1 import bulk, frames
from nearkin.v1 import neighbours_pb2 as pb

from nearkin_service.config import KIB, Limits
from nearkin_service.errors import InvalidArgumentError, LimitExceededError, UnavailableError
from nearkin_service.operations import Held, Pushing, Writing
from nearkin_service.ranges import RowSet
from nearkin_service.wire import convert

STALL_SECONDS = 10.0
"""For which a caller may stop in the middle of a message, and keep everybody from its rows."""
_ALIGNED = 64

T = TypeVar("T")


class RowsReceiver:
    """Runs on a connection's own thread; the event loop only hears of each message."""

    def __init__(
        self, pushing: Pushing, writing: Writing, loop: asyncio.AbstractEventLoop, limits: Limits
    ) -> None:
        self._pushing = pushing
        self._writing = writing
        self._loop = loop
        self._most = limits.max_message_bytes
        self._idle_seconds = limits.max_stream_idle_seconds

    def receive(self, connection: socket.socket, push_id: str) -> pb.WriteRowsResponse:
        """All rows that the caller sends. The errors are those of WriteRows."""
        room = _Room()
        settled: Future[None] | None = None
        while (length := frames.receive_length(connection)) is not None:
            if length > self._most + 64 * KIB:
                raise LimitExceededError(
                    "max_message_bytes", f"a message of {length:,} bytes; send smaller ones"
                )
            before, settled = settled, self._message(connection, length, push_id, room)
            if before is not None:
                before.result()
        if settled is not None:
            settled.result()
        return self._on_loop(self._response(push_id)).result()

    def _message(self, connection: socket.socket, length: int, push_id: str, room: _Room) -> Future[None]:
        """Receives and stores one; what comes back is done once the event loop knows."""
        split = bulk.split_write_rows(frames.peek(connection, bulk.MOST_WRITE_ROWS_HEAD), length)
        if split is not None:
            head, head_bytes, nbytes = split
            frames.fill(connection, room.of(head_bytes))
            tail = bytearray(length - head_bytes - nbytes)
            return self._stored(
                head, push_id, nbytes, lambda held: self._received(connection, held, room, head, tail)
            )
        data = room.of(length)
        frames.fill(connection, data)
        try:
            message = bulk.decode_write_rows(data)
        except DecodeError:
            raise _no_request() from None
        payload = message.payload
        return self._stored(
            message, push_id, payload.nbytes, lambda held: held.store(payload, message.crc32c)
        )

    def _stored(
        self, head: bulk.WriteRows, push_id: str, nbytes: int, store: Callable[[Held], RowSet]
    ) -> Future[None]:
        if head.push_id != push_id:
            raise InvalidArgumentError("push_id", "the ticket is for another push")
        if head.shared_row_count:
            raise InvalidArgumentError("shared_row_count", "the bulk lane takes payloads only")
        held = self._on_loop(self._writing.hold(push_id, head.row_start, nbytes)).result()
        try:
            zeros = store(held)
        except BaseException:
            self._loop.call_soon_threadsafe(held.push.release, held.rows)
            raise
        return self._on_loop(self._writing.settle(held, zeros))

    def _received(
        self, connection: socket.socket, held: Held, room: _Room, head: bulk.WriteRows, tail: bytearray
    ) -> RowSet:
        def crc() -> int | None:
            if not tail:
                return head.crc32c
            frames.fill(connection, memoryview(tail))
            return bulk.split_write_rows_tail(tail)

        seconds = min(self._idle_seconds, STALL_SECONDS)
        frames.limit_silence(connection, seconds)
        try:
            return held.receive(partial(frames.fill, connection), room.of, crc)
        except BlockingIOError:
            raise UnavailableError(f"nothing moved for {seconds:g} s in the middle of a message") from None
        except DecodeError:
            raise _no_request() from None
        finally:
            frames.limit_silence(connection, self._idle_seconds)

    async def _response(self, push_id: str) -> pb.WriteRowsResponse:
        return convert.stored(self._pushing.get(push_id))

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def _no_request() -> InvalidArgumentError:
    return InvalidArgumentError("request", "not a nearkin.v1.WriteRowsRequest message")


class _Room:
    """Memory for one thing after another: its pages stay, and its end, so that of a payload, is aligned."""

    def __init__(self) -> None:
        self._bytes = memoryview(b"")

    def of(self, length: int) -> memoryview:
        room = -(-length // _ALIGNED) * _ALIGNED
        if room > len(self._bytes):
            self._bytes = memoryview(bytearray(room))
        return self._bytes[room - length : room]
