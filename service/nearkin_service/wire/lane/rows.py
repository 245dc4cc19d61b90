"""Rows that come in over the bulk lane: one message is received while the one before it is stored."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from google.protobuf.message import DecodeError
from nearkin.v1 import bulk, frames
from nearkin.v1 import neighbours_pb2 as pb

from nearkin_service.config import KIB
from nearkin_service.errors import InvalidArgumentError, LimitExceededError
from nearkin_service.operations import Message, Pushing, Writing
from nearkin_service.wire import convert

_ALIGNED = 64

T = TypeVar("T")


class RowsReceiver:
    """Runs on a connection's own two threads; the event loop only hears of each message."""

    def __init__(
        self, pushing: Pushing, writing: Writing, loop: asyncio.AbstractEventLoop, max_message_bytes: int
    ) -> None:
        self._pushing = pushing
        self._writing = writing
        self._loop = loop
        self._most = max_message_bytes

    def receive(self, connection: socket.socket, push_id: str) -> pb.WriteRowsResponse:
        """All rows that the caller sends. The errors are those of WriteRows."""
        stored: Future[Future[None]] | None = None
        with ThreadPoolExecutor(1, "nearkin-lane-store") as storing:
            for place in itertools.cycle((_Place(), _Place())):
                message = self._message(connection, place, push_id)
                settled = stored.result() if stored else None
                if message is None:
                    break
                stored = storing.submit(self._store, message, settled)
        if settled is not None:
            settled.result()
        return self._on_loop(self._response(push_id)).result()

    def _message(self, connection: socket.socket, place: _Place, push_id: str) -> Message | None:
        length = frames.receive_length(connection)
        if length is None:
            return None
        if length > self._most + 64 * KIB:
            raise LimitExceededError("max_message_bytes", f"a message of {length:,} bytes; send smaller ones")
        data = place.of(length)
        frames.fill(connection, data)
        try:
            message = bulk.decode_write_rows(data)
        except DecodeError:
            raise InvalidArgumentError("request", "not a nearkin.v1.WriteRowsRequest message") from None
        if message.push_id != push_id:
            raise InvalidArgumentError("push_id", "the ticket is for another push")
        if message.shared_row_count:
            raise InvalidArgumentError("shared_row_count", "the bulk lane takes payloads only")
        return Message(push_id, message.row_start, message.payload, message.crc32c)

    def _store(self, message: Message, before: Future[None] | None) -> Future[None]:
        """Stores a message; what comes back is done once the loop knows. `before`: that of the last one."""
        if before is not None:
            before.result()
        held = self._on_loop(self._writing.hold(message)).result()
        try:
            zeros = held.store()
        except BaseException:
            self._loop.call_soon_threadsafe(held.push.release, held.rows)
            raise
        return self._on_loop(self._writing.settle(held, zeros))

    async def _response(self, push_id: str) -> pb.WriteRowsResponse:
        return convert.stored(self._pushing.get(push_id))

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


class _Place:
    """Memory for one message after another: its pages stay, and a payload's end, so its rows, are aligned."""

    def __init__(self) -> None:
        self._bytes = memoryview(b"")

    def of(self, length: int) -> memoryview:
        room = -(-length // _ALIGNED) * _ALIGNED
        if room > len(self._bytes):
            self._bytes = memoryview(bytearray(room))
        return self._bytes[room - length : room]
