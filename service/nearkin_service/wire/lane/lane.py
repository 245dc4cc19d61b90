"""Connections of the bulk lane: accepted, asked for their ticket, served by a thread each."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from google.protobuf.message import DecodeError
from nearkin import tracing
from nearkin.v1 import frames
from nearkin.v1 import neighbours_pb2 as pb

from nearkin_service import listening
from nearkin_service.errors import InvalidArgumentError, UnavailableError, lacking
from nearkin_service.operations import Core, Lending, Pushing, Reading, Writing
from nearkin_service.wire.lane.rows import RowsReceiver
from nearkin_service.wire.lane.tables import TableSender
from nearkin_service.wire.lane.tickets import Grant, RowsGrant, Ticket, Tickets
from nearkin_service.wire.origin import Origin
from nearkin_service.wire.status import code_name, meaning

log = logging.getLogger("nearkin.lane")

MOST_CONNECTIONS = 256
"""Who comes after that takes the place of who has shown no ticket for the longest, or is turned away and goes
through gRPC."""
GREETING_SECONDS = 5.0
"""For showing a ticket."""
_LAST_WORDS_SECONDS = 5.0
"""For reading an error."""
_MOST_GREETING_BYTES = 256
_BREATH_SECONDS = 0.1
_BUFFER_BYTES = 1 << 20
"""What is under way to one reader: stays in a core's cache, fills 10 Gbit/s at 0.8 ms."""


class BulkLane:
    """Made, opened and closed on the event loop."""

    def __init__(
        self,
        core: Core,
        *,
        pushing: Pushing,
        writing: Writing,
        lending: Lending,
        reading: Reading,
        count_error: Callable[[str, str], None],
    ) -> None:
        self._core = core
        self._count_error = count_error
        self._idle_seconds = core.config.limits.max_stream_idle_seconds
        loop, limits = asyncio.get_running_loop(), core.config.limits
        self._rows = RowsReceiver(pushing, writing, lending, loop, limits)
        self._tables = TableSender(core, reading)
        self._tickets = Tickets()
        self._listeners: list[socket.socket] = []
        self._doors: list[pb.BulkDoor] = []
        self._beside_unix = False
        self._local: pb.LocalDoor | None = None
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._strangers: dict[socket.socket, None] = {}  # of those; the first is the oldest
        self._closing = False

    # ------------------------------------------------------------------------------------------- offering

    def open(self, addresses: Sequence[str], *, tls: bool) -> None:
        """Listens beside each of the service's addresses. ValueError: a place is taken."""
        port = self._core.config.bulk_port
        if port is None:
            log.info("no bulk lane (--bulk-port off): rows and tables go through gRPC")
            return
        for address in addresses:
            if listening.is_unix(address):
                self._open_beside_socket(address)
            elif tls:
                log.info("no bulk lane beside %s: it would have no TLS", address)
            else:
                self._open_beside_port(address, port)
        if ports := [listening.split_host_port(each)[1] for each in addresses if not listening.is_unix(each)]:
            self._open_locally(ports)

    def _open_beside_socket(self, address: str) -> None:
        try:
            self._listen(listening.bulk_socket(address))
        except ValueError as error:
            log.warning("no bulk lane beside %s: %s", address, error)
        else:
            self._beside_unix = True

    def _open_beside_port(self, address: str, port: int) -> None:
        listener = listening.bulk_port(address, port)
        self._listen(listener)
        taken: int = listener.getsockname()[1]
        log.info("bulk lane of %s on port %d", address, taken)
        self._doors.append(pb.BulkDoor(service_port=listening.split_host_port(address)[1], port=taken))

    def _open_locally(self, ports: Sequence[int]) -> None:
        try:
            listener, name = listening.local_socket()
        except OSError as error:
            log.info("no bulk lane for callers over TCP from this host: %s", error.strerror)
            return
        log.info("bulk lane of callers over TCP from this host, TLS or not: @%s", name)
        self._listen(listener)
        self._local = pb.LocalDoor(name=name, service_ports=ports)

    def _listen(self, listener: socket.socket) -> None:
        self._listeners.append(listener)
        threading.Thread(target=self._accept, args=(listener,), name="nearkin-lane", daemon=True).start()

    def offer(self, grant: Grant, origin: Origin) -> pb.BulkLane | None:
        """A ticket for a caller who comes from there; None where there is no lane for it."""
        doors = [] if origin is Origin.SOCKET else self._doors
        local = self._local if self.shows_host(origin) else None
        if self._closing or not (doors or local or (origin is Origin.SOCKET and self._beside_unix)):
            return None
        ticket = self._tickets.issue(grant)
        return pb.BulkLane(ticket=ticket.shown, answer=ticket.answer, doors=doors, local=local)

    def shows_host(self, origin: Origin) -> bool:
        """Whether a caller who comes from there by TCP is offered a door that only this host has."""
        return origin is Origin.HOST and self._local is not None

    # -------------------------------------------------------------------------------------------- serving

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing:
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if not self._closing:
                    log.warning("the bulk lane takes no connection: %s", error.strerror)
                    time.sleep(_BREATH_SECONDS)
                continue
            self._take(connection)

    def _take(self, connection: socket.socket) -> None:
        thread = threading.Thread(
            target=self._serve, args=(connection,), name="nearkin-lane-caller", daemon=True
        )
        why = f"there are {MOST_CONNECTIONS}"
        with self._lock:
            if len(self._connections) >= MOST_CONNECTIONS and self._strangers:
                self._turn_out(next(iter(self._strangers)))
            if not self._closing and len(self._connections) < MOST_CONNECTIONS:
                self._connections[connection], self._strangers[connection] = thread, None
                try:
                    thread.start()
                except RuntimeError as none_left:
                    self._forget(connection)
                    why = str(none_left)
                else:
                    return
        log.info("a caller of the bulk lane was turned away: %s", why)
        connection.close()

    def _turn_out(self, stranger: socket.socket) -> None:
        """Its thread has nothing more to wait for, and ends."""
        self._forget(stranger)
        _shut(stranger)

    def _forget(self, connection: socket.socket) -> None:
        self._connections.pop(connection, None)
        self._strangers.pop(connection, None)

    def _serve(self, connection: socket.socket) -> None:
        try:
            ticket, only_answer = self._greeted(connection)
            if ticket is not None and only_answer:
                frames.send(connection, pb.BulkReply(answer=ticket.answer).SerializeToString())
            elif ticket is not None:
                frames.limit_silence(connection, self._idle_seconds)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
                frames.send(connection, pb.BulkReply(answer=ticket.answer).SerializeToString())
                self._do(connection, ticket.grant)
        except (OSError, frames.Ended, frames.Malformed) as error:
            log.info("a caller of the bulk lane is gone: %s", error)
        except RuntimeError as error:
            if lacking(error) is None:
                raise
            log.info("a caller of the bulk lane was turned away: %s", error)
        finally:
            with self._lock:
                self._forget(connection)
            connection.close()

    def _greeted(self, connection: socket.socket) -> tuple[Ticket | None, bool]:
        """The ticket that a caller shows in time, and whether to see the answer is all he wants.

        None for a stranger, who is told nothing.
        """
        watch = threading.Timer(GREETING_SECONDS, _shut, (connection,))
        watch.daemon = True
        watch.start()
        try:
            hello = frames.receive(connection, _MOST_GREETING_BYTES)
        finally:
            watch.cancel()
        try:
            greeting = pb.BulkHello.FromString(hello or b"")
        except DecodeError:
            greeting = pb.BulkHello()
        find = self._tickets.find if greeting.only_answer else self._tickets.redeem
        with self._lock:
            ticket = find(greeting.ticket) if connection in self._strangers else None
            self._strangers.pop(connection, None)
        if ticket is None:
            log.warning("a caller of the bulk lane had no ticket that is good here")
            self._count_error("BulkLane", "UNAUTHENTICATED")
        return ticket, greeting.only_answer

    def _do(self, connection: socket.socket, grant: Grant) -> None:
        """What the ticket is for."""
        if isinstance(grant, RowsGrant):
            with tracing.span("bulk rows", grant.span, push=grant.push_id):
                self._answer(connection, "WriteRows", lambda: self._receive(connection, grant.push_id))
        else:
            with tracing.span("bulk table", grant.span, generation=grant.generation.number):
                self._answer(connection, "ReadTable", lambda: self._tables.send(connection, grant))

    def _receive(self, connection: socket.socket, push_id: str) -> pb.BulkReply:
        return pb.BulkReply(stored=self._rows.receive(connection, push_id))

    def _answer(self, connection: socket.socket, name: str, work: Callable[[], pb.BulkReply | None]) -> None:
        """Does the work; errors are told as by gRPC, but to a caller who is gone."""
        try:
            reply = work()
        except (ConnectionError, TimeoutError, frames.Ended):
            raise
        except BlockingIOError:
            seconds = f"{self._idle_seconds:g} s and was ended (max_stream_idle_seconds)"
            reply = self._refusal(name, UnavailableError(f"nothing moved on the stream for {seconds}"))
        except frames.Malformed as error:
            reply = self._refusal(name, InvalidArgumentError("request", str(error)))
        except Exception as error:
            reply = self._refusal(name, error)
        if reply is not None:
            frames.send(connection, reply.SerializeToString())
        _part(connection)

    def _refusal(self, name: str, error: Exception) -> pb.BulkReply:
        status = meaning(name, error)
        self._count_error(name, code_name(status))
        return pb.BulkReply(status=status.SerializeToString())

    # -------------------------------------------------------------------------------------------- closing

    async def close(self, seconds: float) -> None:
        """Takes nobody new, lets callers finish for so long, then ends them."""
        self._closing = True
        for listener in self._listeners:
            _shut(listener)
            listener.close()
        await asyncio.to_thread(self._join, time.monotonic() + seconds)
        with self._lock:
            left = list(self._connections)
        for connection in left:
            _shut(connection)
        await asyncio.to_thread(self._join, time.monotonic() + _LAST_WORDS_SECONDS)

    def _join(self, deadline: float) -> None:
        with self._lock:
            threads = list(self._connections.values())
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def shares(origin: Origin, offered: pb.BulkLane) -> bool:
    """Whether files are named to a caller: by the local door he finds out whether they are on his host."""
    return origin is Origin.SOCKET or offered.HasField("local")


def _shut(connection: socket.socket) -> None:
    """Wakes whoever waits on it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _part(connection: socket.socket) -> None:
    """Ends our direction and takes what is still coming: a close before would throw our last words away."""
    connection.shutdown(socket.SHUT_WR)
    deadline, rest = time.monotonic() + _LAST_WORDS_SECONDS, bytearray(1 << 16)
    frames.limit_silence(connection, _LAST_WORDS_SECONDS)
    while connection.recv_into(rest) and time.monotonic() < deadline:
        pass
