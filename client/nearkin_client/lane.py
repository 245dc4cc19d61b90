"""The bulk lane: a socket beside the service's address on which nothing but rows and tables moves.

gRPC agrees on what may move and hands out a ticket; the bytes then go from where they lie into the socket,
without HTTP/2 and its copies. Whoever did not dial the service itself (a proxy stands between, or a published
port) or cannot reach the lane goes on through gRPC.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from google.rpc import status_pb2  # type: ignore[import-untyped]
from nearkin.v1 import bulk, frames
from nearkin.v1 import neighbours_pb2 as pb
from nearkin.v1.checksums import crc32c, followed_by
from numpy.typing import NDArray

from nearkin_client.arrays import Rows, in_pieces, sound
from nearkin_client.channel import Endpoint
from nearkin_client.doors import Address, NoLane, answered, connect, door, reply
from nearkin_client.errors import Cancelled, DataLoss
from nearkin_client.splicing import Splice

SMALLEST_BYTES = 1 << 20
"""Less than this goes through gRPC: a connection of its own would not pay."""
STALL_SECONDS = 30.0
"""A lane that moves nothing for so long is taken for dead."""
_PIECE_BYTES = 512 << 10  # is still in a core's cache when it is summed up
_SENT_BYTES = 1 << 20  # the same, when it is sent
_STATUS_TAG = b"\x22"
_AVOID_SECONDS = 60.0
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class LaneError(grpc.RpcError):
    """What a call over the lane ended in; to its callers like the same end of a gRPC call."""

    def __init__(self, code: grpc.StatusCode, details: str, status: bytes = b"") -> None:
        super().__init__(details)
        self._code = code
        self._details = details
        self._status = status

    @classmethod
    def told(cls, status: bytes) -> LaneError:
        """As the service says."""
        found: Any = status_pb2.Status.FromString(status)
        return cls(_CODES.get(found.code, grpc.StatusCode.UNKNOWN), found.message, status)

    def code(self) -> grpc.StatusCode:
        """Of the call's end."""
        return self._code

    def details(self) -> str:
        """What was said, or noticed."""
        return self._details

    def trailing_metadata(self) -> tuple[Any, ...]:
        """Where `google.rpc` details are looked for."""
        return (("grpc-status-details-bin", self._status),) if self._status else ()


class Sockets:
    """The lane's connections of one client, so that closing it ends them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = False
        self._avoided: dict[Address, float] = {}

    def avoid(self, address: Address) -> None:
        """It cannot be reached: who waited for that once need not do so each time."""
        self._avoided[address] = time.monotonic() + _AVOID_SECONDS

    def avoids(self, address: Address) -> bool:
        """Whether that was noticed a moment ago."""
        return self._avoided.get(address, 0.0) > time.monotonic()

    @contextmanager
    def holding(self, connection: socket.socket) -> Iterator[None]:
        """Closes it in the end. Cancelled: the client was closed meanwhile."""
        try:
            with connection:
                with self._lock:
                    self._open.add(connection)
                    if self._closed:
                        raise Cancelled("the client is closed")
                yield
        except LaneError as error:
            if self._closed:
                raise Cancelled("the client is closed") from error
            raise
        finally:
            with self._lock:
                self._open.discard(connection)

    def close(self) -> None:
        """Ends all that are open. Idempotent."""
        with self._lock:
            self._closed = True
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class Lane:
    """The way in that one answer of the service offered."""

    def __init__(self, offer: pb.BulkLane, endpoint: Endpoint, sockets: Sockets) -> None:
        """NoLane: it is not for whoever dialled this endpoint."""
        if not offer.ticket:
            raise NoLane("the service offers no bulk lane")
        self._ticket = offer.ticket
        self._answer = offer.answer
        self._sockets = sockets
        self._address = door(offer, endpoint)
        if sockets.avoids(self._address):
            raise NoLane(f"{self} could not be reached a moment ago")

    @property
    def is_local(self) -> bool:
        """Whether only this host has it."""
        return isinstance(self._address, str)

    def __str__(self) -> str:
        if isinstance(self._address, tuple):
            return f"port {self._address[1]}"
        return self._address.replace("\0", "@")

    def write_rows(
        self,
        messages: Iterable[bulk.WriteRows],
        seconds: float,
        sent: Callable[[bulk.WriteRows, int], None],
        rows: Rows,
    ) -> pb.WriteRowsResponse:
        """One stream of messages of these rows; `sent` hears of each, and its CRC32C.

        LaneError; NoLane: nothing was sent.
        """
        call = _Call(seconds)
        connection = self._connected()
        with (
            self._sockets.holding(connection),
            call.lost_as_error(),
            _sending(connection, lasting=rows.in_place) as send,
        ):
            try:
                for message in messages:
                    call.wait_no_longer(connection)
                    if _has_answer(connection):
                        break
                    sent(message, send_rows(connection, message, rows, send))
                connection.shutdown(socket.SHUT_WR)
            except BlockingIOError:
                raise
            except OSError:
                return _stored(connection)  # the service ended it, and has said why
            call.wait_no_longer(connection)
            return _stored(connection)

    def read_table(
        self, columns: Mapping[int, NDArray[Any]], row_start: int, seconds: float
    ) -> dict[int, int]:
        """Fills the columns (by their `pb.TableColumn`), from this row of the table on; the CRC32C of each.

        LaneError; NoLane: nothing was read. DataLoss: a block is damaged, or not the one that comes next.
        """
        call = _Call(seconds)
        connection = self._connected()
        with self._sockets.holding(connection), call.lost_as_error():
            return {
                column: _read_column(connection, call, _Goal(column, table, row_start))
                for column, table in columns.items()
            }

    def _connected(self) -> socket.socket:
        """A connection that has shown its ticket, and whose other end has proven itself. NoLane."""
        try:
            connection = connect(self._address)
        except OSError as error:
            self._sockets.avoid(self._address)
            raise NoLane(f"{self} cannot be reached: {error.strerror or error}") from error
        try:
            if answered(connection, self._ticket, self._answer):
                return connection
        except (OSError, frames.Ended, frames.Malformed, DecodeError) as error:
            connection.close()
            raise NoLane(f"{self} does not let us in ({str(error) or type(error).__name__})") from error
        connection.close()
        raise NoLane(f"{self} is not the service's")


@dataclass(frozen=True, slots=True)
class _Goal:
    """Where a column's blocks go: `table` [n, k] begins with this row."""

    column: int
    table: NDArray[Any]
    row_start: int

    @property
    def row_bytes(self) -> int:
        return int(self.table.strides[0])


class _Call:
    """The deadline of one call over the lane."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def wait_no_longer(self, connection: socket.socket) -> None:
        """No read or write from now on waits beyond the deadline, or for a dead peer."""
        frames.limit_silence(connection, min(STALL_SECONDS, max(self._end - time.monotonic(), 0.001)))

    @contextmanager
    def lost_as_error(self) -> Iterator[None]:
        """A connection that breaks, or moves nothing, as the status that gRPC would find for it."""
        try:
            yield
        except BlockingIOError:
            if time.monotonic() >= self._end:
                raise LaneError(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline exceeded") from None
            raise LaneError(grpc.StatusCode.UNAVAILABLE, f"nothing moved for {STALL_SECONDS:g} s") from None
        except (OSError, frames.Ended, frames.Malformed, DecodeError) as error:
            raise LaneError(grpc.StatusCode.UNAVAILABLE, f"bulk lane: {error}") from error


@contextmanager
def _sending(connection: socket.socket, *, lasting: bool) -> Iterator[Callable[[memoryview], None]]:
    """What sends bulk bytes the quickest."""
    if not (lasting and Splice.suits(connection)):
        yield connection.sendall
        return
    with closing(Splice(connection)) as splice:
        yield splice.send


def send_rows(
    connection: socket.socket, message: bulk.WriteRows, rows: Rows, send: Callable[[memoryview], None]
) -> int:
    """A message, each piece of it looked at, summed up and sent while it is in a core's cache; the CRC32C."""
    payload, crc, all_sound = message.payload.cast("B"), 0, True
    head = bulk.write_rows_head(message)
    frames.send_head(connection, head, len(payload) + bulk.WRITE_ROWS_TAIL_BYTES)
    for piece in in_pieces(payload, rows.row_bytes, _SENT_BYTES):
        crc = crc32c(piece, crc)
        all_sound = all_sound and sound(piece, rows)
        send(piece)
    connection.sendall(bulk.write_rows_tail(crc, sound=all_sound))
    return crc


def _read_column(connection: socket.socket, call: _Call, goal: _Goal) -> int:
    place = goal.table.reshape(-1).view(np.uint8).data
    done = whole = 0
    while done < len(place):
        call.wait_no_longer(connection)
        length = _length(connection)
        start = memoryview(bytearray(min(length, bulk.MOST_BLOCK_HEAD)))
        frames.fill(connection, start)
        _raise_if_told(connection, bytes(start), length)
        block, head_bytes = bulk.split_table_block(start, length)
        nbytes = length - head_bytes
        expected = (goal.column, goal.row_start + done // goal.row_bytes, block.row_count * goal.row_bytes)
        if (block.column, block.row_start, nbytes) != expected or not 0 < nbytes <= len(place) - done:
            raise DataLoss("a block of a neighbour table does not fit its header")
        crc = _receive(connection, place[done : done + nbytes], start[head_bytes:])
        if crc != block.crc32c:
            raise DataLoss("a neighbour table arrived damaged: crc32c of its block differs")
        whole = followed_by(whole, crc, nbytes)
        done += nbytes
    return whole


def _receive(connection: socket.socket, place: memoryview, begun: memoryview) -> int:
    """Fills the place, whose first bytes are here already; its CRC32C, summed up piece by piece."""
    place[: len(begun)] = begun
    crc = crc32c(begun)
    for at in range(len(begun), len(place), _PIECE_BYTES):
        piece = place[at : at + _PIECE_BYTES]
        frames.fill(connection, piece)
        crc = crc32c(piece, crc)
    return crc


def _raise_if_told(connection: socket.socket, start: bytes, length: int) -> None:
    """LaneError: this is no block but an error of the service."""
    if start[:1] != _STATUS_TAG or length > frames.MOST_SMALL_BYTES:
        return
    rest = bytearray(length - len(start))
    frames.fill(connection, memoryview(rest))
    raise LaneError.told(pb.BulkReply.FromString(start + bytes(rest)).status)


def _length(connection: socket.socket) -> int:
    length = frames.receive_length(connection)
    if length is None:
        raise frames.Ended("the service closed the connection")
    return length


def _has_answer(connection: socket.socket) -> bool:
    """Whether the service has said something, or ended, before we were done."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


def _stored(connection: socket.socket) -> pb.WriteRowsResponse:
    said = reply(connection)
    if said.WhichOneof("outcome") == "status":
        raise LaneError.told(said.status)
    return said.stored
