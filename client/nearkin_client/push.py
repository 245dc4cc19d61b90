"""Sending rows: in messages that suit their way, and going on where a broken stream stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

import grpc
from nearkin.v1 import bulk
from nearkin.v1 import neighbours_pb2 as pb
from nearkin.v1.checksums import crc32c

from nearkin_client import ranges
from nearkin_client.arrays import Rows
from nearkin_client.digest import Digest
from nearkin_client.doors import NoLane
from nearkin_client.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    NearkinError,
    PushFailed,
    error_from_rpc,
    status_of,
)
from nearkin_client.lane import SMALLEST_BYTES, Lane
from nearkin_client.patience import Deadline, Persistence, interrupted, out_of_time
from nearkin_client.shared import LentRows, in_advance, joined, lent
from nearkin_client.wire import Wire

log = logging.getLogger("nearkin.client.push")

STREAM_BYTES = 1 << 30
"""A stream is closed and acknowledged after this much, and the next one opened."""
SMALLEST_MESSAGE = 256 << 10
STREAM_SHARE = 256
"""Messages hold as much as suits the service, but no more than this part of the push, nor less than that."""
LANE_BYTES, LANE_SMALLEST, LANE_SHARE = 16 << 20, 1 << 20, 64
"""The same on the bulk lane, where a message costs half a millisecond, as much as 2 MiB of rows."""
IN_PLACE_BYTES, IN_PLACE_SHARE = 256 << 20, 4
"""The same for rows that are written in place: nothing is sent twice, and few messages cost little."""
WRITTEN_BYTES, WRITTEN_SHARE = 16 << 20, 4
"""What one thread writes of such a message at a time."""
DAMAGED_ATTEMPTS = 3
"""How often a stream that arrived damaged is sent again before it is given up."""


class Sender:
    """Sends one rank's rows of a push that was begun."""

    def __init__(
        self,
        wire: Wire,
        begin: Callable[[], pb.BeginPushResponse],
        rows: Rows,
        row_start: int,
        deadline: Deadline,
        *,
        shared_memory: Literal["auto"] | bool = "auto",
    ) -> None:
        """`begin` begins the push, or joins it again."""
        self._wire = wire
        self._begin = begin
        wanted = shared_memory if rows.count else False
        begun, self._lent = self._borrow(rows, row_start, wanted)
        self._push = begun.push
        self._offer = begun.bulk_lane
        self._most_message_bytes = begun.max_message_bytes
        self._rows = rows
        self._row_start = row_start
        self._deadline = deadline
        self._doing = f"push of epoch {begun.push.epoch} of run {begun.push.run!r}"
        # Rows that somebody else stored before: only sending ours shows whether they are the same.
        self._foreign = _stored(begun.push)
        self._digest = Digest(rows)
        self._loan = begun.lent_rows.loan  # others wait for it, even if we cannot write in place
        self._loan_lost = self._asked_again = False
        self._paces = _Paces.of(begun, rows)
        self._lane = self._find_lane() if self._lent is None and rows.count else None

    def _borrow(
        self, rows: Rows, row_start: int, wanted: Literal["auto"] | bool
    ) -> tuple[pb.BeginPushResponse, LentRows | None]:
        """The push, and what its rows are written into.

        Begins again where shared memory is a must and the service ended before it could show that it is here.
        """
        begun = self._begin()
        while True:
            try:
                return begun, lent(begun, rows, row_start, wanted, self._wire)
            except FailedPrecondition:
                before, begun = begun, self._begin()
                if begun.bulk_lane.local.name == before.bulk_lane.local.name:
                    self._abort_if_empty(begun.push)
                    raise

    def _abort_if_empty(self, push: pb.Push) -> None:
        """Of an error that comes before the first row nothing should be left, if nobody else sends either."""
        if push.state == pb.PUSH_STATE_OPEN and not push.rows_stored:
            request = pb.AbortPushRequest(push_id=push.push_id)
            with suppress(NearkinError):
                self._wire.ask(lambda stub: stub.AbortPush, request, doing="aborting a push")

    @property
    def _pace(self) -> _Pace:
        if self._lent is not None:
            return self._paces.in_place
        return self._paces.stream if self._lane is None else self._paces.lane

    def _find_lane(self) -> Lane | None:
        """What the connection is, bulk lane or gRPC (None); says at INFO which and why."""
        if self._rows.count * self._rows.row_bytes < SMALLEST_BYTES:
            log.info("%s: the connection is gRPC: these are few bytes", self._doing)
            return None
        try:
            lane = self._wire.lane(self._offer)
        except NoLane as why:
            log.info("%s: the connection is gRPC: %s", self._doing, why)
            return None
        log.info("%s: the connection is the bulk lane, %s", self._doing, lane)
        return lane

    def digest(self) -> int:
        """CRC32C of all rows given."""
        return self._digest.whole(self._pace.rows_per_message)

    def send_all(self) -> pb.Push:
        """`send` of every row given."""
        count = self._rows.count
        return self.send([(self._row_start, self._row_start + count)] if count else [])

    def send(self, todo: list[ranges.Range]) -> pb.Push:
        """Return once the service has these classes' rows, or raise. Some may be stored in either case."""
        try:
            return self._send(todo)
        finally:
            if self._lent is not None:
                self._lent.close()

    def _send(self, todo: list[ranges.Range]) -> pb.Push:
        persistence = Persistence(self._deadline, self._wire.patience.outage)
        damaged = 0
        while todo:
            batch = ranges.first(todo, self._pace.rows_per_stream)
            stream = _Stream()
            try:
                self._push = self._write(self._messages(batch, stream)).push
                arrived = batch
            except grpc.RpcError as error:
                damaged = self._judge(error, stream.failure, persistence, damaged)
                arrived = self._arrived(stream.sent)
            todo = ranges.subtract(todo, arrived)
            if arrived:
                damaged, self._asked_again = 0, False
                persistence.progressed()
            if self._loan_lost:
                self._borrow_again(todo)
        self._raise_if_failed()
        return self._push

    def _write(self, messages: Iterator[bulk.WriteRows]) -> pb.WriteRowsResponse:
        if self._lane is not None:
            try:
                return self._lane.write_rows(messages, self._seconds(), self._sent, self._rows)
            except NoLane as why:
                log.info("%s: what is left goes through gRPC: %s", self._doing, why)
                self._lane = None
        return self._wire.write_rows(messages, self._seconds())

    def _messages(self, batch: list[ranges.Range], stream: _Stream) -> Iterator[bulk.WriteRows]:
        """The messages of one stream, which notes what became of them. May run on gRPC's thread."""
        try:
            rows = self._pace.rows_per_message
            if self._lent:
                pieces = ranges.pieces(batch, self._rows_at_a_time)
                made = joined(in_advance(self._message, pieces), self._rows.row_bytes, rows)
            else:
                made = map(self._message, ranges.pieces(batch, rows))
            for message in made:
                start = message.row_start
                stream.sent.append((start, start + self._count(message)))
                if message.crc32c is not None:
                    self._sent(message, message.crc32c)
                yield message
        except Exception as failure:
            stream.failure = failure
            raise

    @property
    def _rows_at_a_time(self) -> int:
        """Of what is written in place; rows that others have stored are sent, in messages of as many."""
        most = min(WRITTEN_BYTES, self._most_message_bytes) // self._rows.row_bytes
        return max(1, min(most, self._pace.rows_per_message // WRITTEN_SHARE))

    def _message(self, piece: ranges.Range) -> bulk.WriteRows:
        lent, (start, stop) = self._lent, piece
        if lent is not None and not ranges.intersect([piece], self._foreign):
            return lent.write(start, stop)
        payload = self._rows.payload(start - self._row_start, stop - self._row_start)
        message = bulk.WriteRows(self._push.push_id, start, payload, loan=self._loan)
        if self._lane is None:  # which sums it up while it sends
            message = replace(message, crc32c=crc32c(payload))
        return message

    def _count(self, message: bulk.WriteRows) -> int:
        return message.shared_row_count or message.payload.nbytes // self._rows.row_bytes

    def _sent(self, message: bulk.WriteRows, crc: int) -> None:
        start = message.row_start - self._row_start
        self._digest.note(start, start + self._count(message), crc)

    def _judge(
        self, error: grpc.RpcError, failure: Exception | None, persistence: Persistence, damaged: int
    ) -> int:
        """Return (after a pause) if the rest may be sent again, else raise what is wrong."""
        if isinstance(failure, OSError) and self._lent:
            self._not_in_place(f"rows cannot be written in place: {failure}")
            return damaged
        if failure is not None:
            raise failure
        code, _ = status_of(error)
        if code is grpc.StatusCode.INVALID_ARGUMENT and error_from_rpc(error).field == "loan":
            self._loan_lost = True
            return damaged
        if code is grpc.StatusCode.DATA_LOSS and damaged + 1 < DAMAGED_ATTEMPTS:
            log.warning("%s: %s; sending it again", self._doing, error_from_rpc(error).message)
            return damaged + 1
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise self._late() from error
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            raise PushFailed(error_from_rpc(error).message) from error
        if not interrupted(error):
            raise error_from_rpc(error) from error
        persistence.pause_or_raise(error, self._doing)
        return damaged

    def _borrow_again(self, todo: list[ranges.Range]) -> None:
        """The service was started again, or took back what we did not use in time."""
        self._loan, self._loan_lost = "", False
        if self._lent is None:
            return
        if not self._asked_again:
            self._asked_again = True
            begun = self._begin()
            if self._lent.renewed(begun, self._wire):
                self._loan = begun.lent_rows.loan
                self._foreign += ranges.intersect(todo, _stored(begun.push))
                log.info("%s: rows were lent to us again", self._doing)
                return
        self._not_in_place("they are not lent to us any more")

    def _not_in_place(self, why: str) -> None:
        log.info("%s: what is left goes through the connection (%s)", self._doing, why)
        if self._lent is not None:
            self._lent.close()
        self._lent = None
        self._lane = self._find_lane()

    def _arrived(self, sent: list[ranges.Range]) -> list[ranges.Range]:
        """What of this stream the service has, as it says itself."""
        request = pb.GetPushRequest(push_id=self._push.push_id)
        self._push = self._wire.ask(
            lambda stub: stub.GetPush, request, doing=self._doing, timeout=self._seconds()
        )
        self._raise_if_failed()
        ours = ranges.subtract(ranges.normalised(sent), self._foreign)
        arrived = ranges.intersect(ours, _stored(self._push))
        log.info("%s: going on, %d rows of the broken stream had arrived", self._doing, ranges.total(arrived))
        return arrived

    def _seconds(self) -> float:
        if not self._deadline.remaining:
            raise self._late()
        return self._deadline.remaining

    def _late(self) -> DeadlineExceeded:
        return out_of_time(self._doing, self._deadline)

    def _raise_if_failed(self) -> None:
        if self._push.state in (pb.PUSH_STATE_FAILED, pb.PUSH_STATE_ABORTED):
            raise PushFailed(f"{self._doing}: {self._push.error or 'it was aborted'}")


@dataclass(slots=True)
class _Stream:
    """What was handed over, and what went wrong here. One that broke may still be read, by gRPC's thread."""

    sent: list[ranges.Range] = field(default_factory=list)
    failure: Exception | None = None


@dataclass(frozen=True, slots=True)
class _Pace:
    """How many rows go at a time."""

    rows_per_message: int
    rows_per_stream: int


@dataclass(frozen=True, slots=True)
class _Paces:
    """By the way that rows take. A cut loses about a message, so a small push goes in smaller ones."""

    in_place: _Pace
    lane: _Pace
    stream: _Pace

    @staticmethod
    def of(begun: pb.BeginPushResponse, rows: Rows) -> _Paces:
        total, most = rows.count * rows.row_bytes, begun.max_message_bytes

        def per_message(most_bytes: int, share: int, least_bytes: int = SMALLEST_MESSAGE) -> int:
            return max(1, min(most_bytes, max(least_bytes, total // share)) // rows.row_bytes)

        def sent(rows_per_message: int) -> _Pace:
            return _Pace(rows_per_message, max(rows_per_message, STREAM_BYTES // rows.row_bytes))

        most_in_place = min(begun.lent_rows.max_bytes or most, IN_PLACE_BYTES)
        return _Paces(
            in_place=_Pace(per_message(most_in_place, IN_PLACE_SHARE), rows.count),
            lane=sent(per_message(min(most, LANE_BYTES), LANE_SHARE, LANE_SMALLEST)),
            stream=sent(per_message(begun.chunk_bytes, STREAM_SHARE)),
        )


def _stored(push: pb.Push) -> list[ranges.Range]:
    return [(each.start, each.start + each.count) for each in push.stored]
