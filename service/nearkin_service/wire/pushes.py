"""BeginPush, WriteRows, GetPush, CommitPush, AbortPush."""

# ruff: noqa: N802 - the protocol's method names

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import ExitStack, nullcontext

from nearkin import tracing
from nearkin.v1 import bulk
from nearkin.v1 import neighbours_pb2 as pb

from nearkin_service.config import ServiceConfig
from nearkin_service.errors import InvalidArgumentError
from nearkin_service.operations import Core, Lending, Loan, Message, Pushing, Writing
from nearkin_service.ranges import RowRange
from nearkin_service.values import PushView
from nearkin_service.wire import convert
from nearkin_service.wire.handlers import Context
from nearkin_service.wire.lane import BulkLane, RowsGrant, shares
from nearkin_service.wire.liveliness import lively
from nearkin_service.wire.origin import Origin
from nearkin_service.wire.requests import BeginPush

_STREAM_DEPTH = 2
"""Messages of one stream that are stored while the next one is received."""

_MANY_BYTES = 1 << 18
"""Of absent classes. Who sends more waits for others who do: each takes a lot of memory for a while."""


class PushMethods:
    """The RPCs of a push."""

    def __init__(
        self, core: Core, pushing: Pushing, writing: Writing, lending: Lending, lane: BulkLane
    ) -> None:
        self._core = core
        self._pushing = pushing
        self._writing = writing
        self._lending = lending
        self._lane = lane
        self._config: ServiceConfig = core.config
        self._many_absent = asyncio.Lock()
        self._storing = asyncio.Semaphore(2 * core.config.io_threads)

    async def BeginPush(self, asked: BeginPush, context: Context) -> pb.BeginPushResponse:
        origin, request = Origin.of(context), asked.message
        spec, commit = convert.push_spec(request), request.commit_when_complete
        rows_at = convert.rows_at(request)
        rows = spec.range_of(request.row_start, request.row_count) if request.row_count else None
        async with self._many_absent if asked.absent_bytes > _MANY_BYTES else nullcontext():
            view = await self._pushing.begin(spec, asked.absent, commit_when_complete=commit, rows_at=rows_at)
        response = pb.BeginPushResponse(
            push=convert.push(view),
            chunk_bytes=self._config.suiting_bytes,
            max_message_bytes=self._config.limits.max_message_bytes,
        )
        if request.accept_bulk_lane:
            grant = RowsGrant(view.push_id, tracing.here())
            if lane := self._lane.offer(grant, origin):
                response.bulk_lane.CopyFrom(lane)
        if request.accept_shared_memory and rows is not None and shares(origin, response.bulk_lane):
            self._lend(request, view, rows, response)
        return response

    def _lend(
        self, request: pb.BeginPushRequest, view: PushView, rows: RowRange, response: pb.BeginPushResponse
    ) -> None:
        """Nothing of a file whose rows begin where the caller would not look for them."""
        files = self._core.files.get(view.push_id)
        rows_at = files.rows.rows_at if files else 0
        if rows_at and not request.HasField("rows_at"):
            return
        device, inode = files.rows.identity if files else (0, 0)
        loan = self._lending.offer(view.push_id, rows)
        lent = pb.LentRows(
            path=str(self._core.directory.rows_path(view.spec.run, view.push_id)),
            loan=loan.name if loan else "",
            max_bytes=self._writing.most_bytes_in_place,
            rows_at=rows_at,
            device=device,
            inode=inode,
        )
        response.lent_rows.CopyFrom(lent)

    async def WriteRows(
        self, messages: AsyncIterator[bulk.WriteRows], _context: Context
    ) -> pb.WriteRowsResponse:
        """Whatever the stream's fate, a message once handed over is stored to its end."""
        idle = self._config.limits.max_stream_idle_seconds
        with ExitStack() as held:
            return await self._write_rows(lively(messages, idle), held)

    async def _write_rows(
        self, messages: AsyncIterator[bulk.WriteRows], held: ExitStack
    ) -> pb.WriteRowsResponse:
        pending: deque[asyncio.Task[PushView]] = deque()
        push_id, loan = "", None
        async for message in messages:
            convert.require_place(message)
            push_id = _same_push(message, push_id)
            if message.loan != (loan.name if loan else ""):
                loan = held.enter_context(self._lending.using(message.loan, push_id))
            await self._storing.acquire()
            pending.append(self._core.spawn(self._store(message, loan)))
            if len(pending) > _STREAM_DEPTH:
                await asyncio.shield(pending.popleft())
        while pending:
            await asyncio.shield(pending.popleft())
        if not push_id:
            raise InvalidArgumentError("push_id", "the stream carried no message")
        return convert.stored(self._pushing.get(push_id))

    async def _store(self, message: bulk.WriteRows, loan: Loan | None) -> PushView:
        push_id, start, crc = message.push_id, message.row_start, message.crc32c
        try:
            if not message.shared_row_count:
                return await self._writing.write(Message(push_id, start, message.payload, crc), loan)
            if message.payload.nbytes:
                raise InvalidArgumentError(
                    "payload", "given although shared_row_count says where the rows are"
                )
            if loan is None:
                raise InvalidArgumentError("loan", "rows in place need the name of theirs")
            count = message.shared_row_count
            return await self._writing.write_in_place(push_id, start, count, crc, loan, sound=message.sound)
        finally:
            self._storing.release()

    async def GetPush(self, request: pb.GetPushRequest, _context: Context) -> pb.Push:
        return convert.push(self._pushing.get(request.push_id))

    async def CommitPush(self, request: pb.CommitPushRequest, _context: Context) -> pb.Push:
        crc = request.rows_crc32c if request.HasField("rows_crc32c") else None
        if not request.HasField("part"):
            return convert.push(await self._pushing.commit(request.push_id, crc))
        part = RowRange(request.part.start, request.part.start + request.part.count)
        return convert.push(await self._pushing.vouch(request.push_id, part, crc))

    async def AbortPush(self, request: pb.AbortPushRequest, _context: Context) -> pb.Push:
        return convert.push(await self._pushing.abort(request.push_id))


def _same_push(message: bulk.WriteRows, push_id: str) -> str:
    if push_id and message.push_id != push_id:
        raise InvalidArgumentError("push_id", "one stream carries the rows of one push; open another stream")
    return message.push_id
