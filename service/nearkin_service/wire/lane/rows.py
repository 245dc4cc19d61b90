"""Rows that come in over the bulk lane, a piece at a time: written where they belong, or compared.

A message holds its rows from its first byte on: who sends the same ones waits for it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from google.protobuf.message import DecodeError
from nearkin.v1 import bulk, frames
from nearkin.v1 import neighbours_pb2 as pb
from nearkin.v1.room import Room

from nearkin_service.config import KIB, Limits
from nearkin_service.errors import InvalidArgumentError, LimitExceededError, UnavailableError
from nearkin_service.operations import Held, Lending, Loan, Pushing, Writing
from nearkin_service.ranges import RowSet
from nearkin_service.values import Ending
from nearkin_service.wire import convert

STALL_SECONDS = 10.0
"""For which a caller may stop in the middle of a message, and keep everybody from its rows."""

T = TypeVar("T")


class RowsReceiver:
    """Runs on a connection's own thread; the event loop only hears of each message."""

    def __init__(
        self,
        pushing: Pushing,
        writing: Writing,
        lending: Lending,
        loop: asyncio.AbstractEventLoop,
        limits: Limits,
    ) -> None:
        self._pushing = pushing
        self._writing = writing
        self._lending = lending
        self._loop = loop
        self._most = limits.max_message_bytes
        self._idle_seconds = limits.max_stream_idle_seconds

    def receive(self, connection: socket.socket, push_id: str) -> pb.WriteRowsResponse:
        """All rows that the caller sends. The errors are those of WriteRows."""
        call = _Call(push_id, lambda name: self._lending.using(name, push_id))
        settled: Future[None] | None = None
        with ExitStack() as ending:
            ending.push(lambda *error: self._on_loop(call.ended(*error)).result())
            while (length := frames.receive_length(connection)) is not None:
                if length > self._most + 64 * KIB:
                    raise LimitExceededError(
                        "max_message_bytes", f"a message of {length:,} bytes; send smaller ones"
                    )
                before, settled = settled, self._message(connection, length, call)
                if before is not None:
                    before.result()
            if settled is not None:
                settled.result()
        return self._on_loop(self._response(push_id)).result()

    def _message(self, connection: socket.socket, length: int, call: _Call) -> Future[None]:
        """Receives and stores one; what comes back is done once the event loop knows."""
        room = call.room
        split = bulk.split_write_rows(frames.peek(connection, bulk.MOST_WRITE_ROWS_HEAD), length)
        if split is not None:
            head, head_bytes, nbytes = split
            frames.fill(connection, room.of(head_bytes, 0))
            tail = bytearray(length - head_bytes - nbytes)
            return self._stored(
                head, call, nbytes, lambda held: self._received(connection, held, room, head, tail)
            )
        data = room.of(length, -length)  # a payload is the end
        frames.fill(connection, data)
        try:
            message = bulk.decode_write_rows(data)
        except DecodeError:
            raise _no_request() from None
        payload = message.payload
        return self._stored(message, call, payload.nbytes, lambda held: held.store(payload, message.crc32c))

    def _stored(
        self, head: bulk.WriteRows, call: _Call, nbytes: int, store: Callable[[Held], RowSet]
    ) -> Future[None]:
        convert.require_place(head)
        if head.push_id != call.push_id:
            raise InvalidArgumentError("push_id", "the ticket is for another push")
        if head.shared_row_count:
            raise InvalidArgumentError("shared_row_count", "the bulk lane takes payloads only")
        held = self._on_loop(self._hold(head, call, nbytes)).result()
        try:
            zeros = store(held)
        except BaseException:
            self._loop.call_soon_threadsafe(held.push.release, held.rows)
            raise
        return self._on_loop(self._writing.settle(held, zeros))

    async def _hold(self, head: bulk.WriteRows, call: _Call, nbytes: int) -> Held:
        return await self._writing.hold(call.push_id, head.row_start, nbytes, call.loan(head.loan))

    def _received(
        self, connection: socket.socket, held: Held, room: Room, head: bulk.WriteRows, tail: bytearray
    ) -> RowSet:
        def said() -> tuple[int | None, bool]:
            if not tail:
                return head.crc32c, head.sound
            frames.fill(connection, memoryview(tail))
            return bulk.split_write_rows_tail(tail)

        seconds = min(self._idle_seconds, STALL_SECONDS)
        frames.limit_silence(connection, seconds)
        try:
            ending = Ending(said, looked=head.sound or len(tail) == bulk.WRITE_ROWS_TAIL_BYTES)
            return held.receive(partial(frames.fill, connection), room.of, ending)
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


class _Call:
    """What lasts as long as one connection: room for its messages, and the loans that they name."""

    def __init__(self, push_id: str, using: Callable[[str], AbstractContextManager[Loan]]) -> None:
        self.push_id = push_id
        self.room = Room()
        self._using = using
        self._held = ExitStack()
        self._loans: dict[str, Loan | None] = {"": None}

    def loan(self, name: str) -> Loan | None:
        """On the event loop. InvalidArgumentError: there is none of this name."""
        if name not in self._loans:
            self._loans[name] = self._held.enter_context(self._using(name))
        return self._loans[name]

    async def ended(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the loans back; after an error somebody may go on with them."""
        self._held.__exit__(kind, error, trace)
