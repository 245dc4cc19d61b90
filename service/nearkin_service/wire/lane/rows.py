"""Rows that come in over the bulk lane: one message is received while the one before it is stored."""

from __future__ import annotations

import asyncio
import itertools
import socket
from concurrent.futures import Future

from google.protobuf.message import DecodeError
from nearkin.v1 import bulk, frames
from nearkin.v1 import neighbours_pb2 as pb

from nearkin_service.config import KIB
from nearkin_service.errors import InvalidArgumentError, LimitExceededError
from nearkin_service.operations import Pushing
from nearkin_service.values import PushView
from nearkin_service.wire import convert

_ALIGNED = 64


class RowsReceiver:
    """Runs on a connection's own thread; storing happens where WriteRows does it."""

    def __init__(self, pushing: Pushing, loop: asyncio.AbstractEventLoop, max_message_bytes: int) -> None:
        self._pushing = pushing
        self._loop = loop
        self._most = max_message_bytes

    def receive(self, connection: socket.socket, push_id: str) -> pb.WriteRowsResponse:
        """All rows that the caller sends. The errors are those of WriteRows."""
        storing: Future[PushView] | None = None
        for place in itertools.cycle((_Place(), _Place())):
            message = self._message(connection, place, push_id)
            if storing is not None:
                storing.result()
            if message is None:
                return self._response(push_id)
            storing = self._on_loop(message)
        raise AssertionError

    def _message(self, connection: socket.socket, place: _Place, push_id: str) -> bulk.WriteRows | None:
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
        return message

    def _on_loop(self, message: bulk.WriteRows) -> Future[PushView]:
        storing = self._pushing.write(message.push_id, message.row_start, message.payload, message.crc32c)
        return asyncio.run_coroutine_threadsafe(storing, self._loop)

    def _response(self, push_id: str) -> pb.WriteRowsResponse:
        async def look() -> pb.WriteRowsResponse:
            return convert.stored(self._pushing.get(push_id))

        return asyncio.run_coroutine_threadsafe(look(), self._loop).result()


class _Place:
    """Memory for one message after another: its pages stay, and a payload's end, so its rows, are aligned."""

    def __init__(self) -> None:
        self._bytes = memoryview(b"")

    def of(self, length: int) -> memoryview:
        room = -(-length // _ALIGNED) * _ALIGNED
        if room > len(self._bytes):
            self._bytes = memoryview(bytearray(room))
        return self._bytes[room - length : room]
