"""The bulk lane on raw sockets: what it takes, whom it turns away, what it says when something is wrong."""

from __future__ import annotations

import logging
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from crc32c import crc32c
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from nearkin.v1 import bulk, frames
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service.config import Limits
from nearkin_service.operations import lending
from nearkin_service.ranges import RowRange
from nearkin_service.store import as_bytes
from nearkin_service.wire.lane import lane as lane_module
from nearkin_service.wire.lane import rows as rows_module
from nearkin_service.wire.lane.tickets import RowsGrant, TableGrant, Tickets

from tests.service.conftest import (
    WAIT,
    Caller,
    Service,
    brute_force,
    eventually,
    messages,
    random_rows,
    read_table,
)

Start = Callable[..., Service]
ROWS = random_rows(60, 16)
GENERATION: Any = None
TABLE = TableGrant(GENERATION, RowRange(0, 1), scores=True)


def offered(caller: Caller, rows: Any = ROWS, epoch: int = 0, **changes: Any) -> tuple[str, pb.BulkLane]:
    begun = caller.begin(rows, epoch, accept_bulk_lane=True, **changes)
    return begun.push.push_id, begun.bulk_lane


@contextmanager
def dialled(caller: Caller, lane: pb.BulkLane) -> Iterator[socket.socket]:
    if lane.HasField("local"):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(f"\0{lane.local.name}")
        assert lane.local.service_ports == [int(caller.address.rpartition(":")[2])]
    elif caller.address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(caller.address.removeprefix("unix://") + ".bulk")
    else:
        (door,) = lane.doors
        assert str(door.service_port) == caller.address.rpartition(":")[2]
        connection = socket.create_connection(("127.0.0.1", door.port))
    with connection:
        frames.limit_silence(connection, WAIT)
        yield connection


@contextmanager
def let_in(caller: Caller, lane: pb.BulkLane) -> Iterator[socket.socket]:
    with dialled(caller, lane) as connection:
        say(connection, pb.BulkHello(ticket=lane.ticket))
        assert hear(connection).answer == lane.answer
        yield connection


def say(connection: socket.socket, message: Any) -> None:
    frames.send(connection, message.SerializeToString())


def hear(connection: socket.socket) -> pb.BulkReply:
    data = frames.receive(connection)
    assert data is not None, "the service ended without a word"
    return pb.BulkReply.FromString(data)


def status(connection: socket.socket) -> Any:
    reply = hear(connection)
    assert reply.WhichOneof("outcome") == "status", reply
    return status_pb2.Status.FromString(reply.status)


def code(found: Any) -> grpc.StatusCode:
    return next(each for each in grpc.StatusCode if each.value[0] == found.code)


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


@pytest.fixture(params=["unix", "tcp", "tcp on this host"])
def either(request: pytest.FixtureRequest, start_service: Start) -> Caller:
    if request.param == "unix":
        return start_service().caller()
    if request.param == "tcp":
        request.getfixturevalue("from_another_host")
    return start_service(listen=("127.0.0.1:0",)).caller()


def test_rows_go_in_and_their_table_comes_of_it(either: Caller) -> None:
    push_id, lane = offered(either)
    with let_in(either, lane) as connection:
        for each in messages(push_id, ROWS, 0, 7):
            say(connection, each)
        connection.shutdown(socket.SHUT_WR)
        stored = hear(connection).stored
        assert is_closed(connection)
    assert (stored.complete, stored.rows_stored) == (True, len(ROWS))
    np.testing.assert_array_equal(either.table(min_epoch=0).ids, brute_force(ROWS, 5))


def test_a_push_may_use_any_number_of_connections(either: Caller) -> None:
    push_id, lane = offered(either)

    def send(part: int) -> None:
        with let_in(either, lane) as connection:
            for each in messages(push_id, ROWS[part::1][:10], part, 3):
                say(connection, each)
            connection.shutdown(socket.SHUT_WR)
            assert hear(connection).WhichOneof("outcome") == "stored"

    writers = [threading.Thread(target=send, args=(start,)) for start in range(0, 60, 10)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    np.testing.assert_array_equal(either.table(min_epoch=0).ids, brute_force(ROWS, 5))


@pytest.mark.parametrize(
    "greeting",
    [
        b"",
        b"\x00",
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\xff" * 64,
        bulk.varint(1 << 40),
        bulk.varint(40) + b"half",
        bulk.varint(34) + pb.BulkHello(ticket=b"x" * 32).SerializeToString(),
    ],
    ids=["nothing", "empty", "http", "http2", "no varint", "long", "half", "made up"],
)
def test_a_stranger_is_told_nothing(caller: Caller, greeting: bytes) -> None:
    _, lane = offered(caller)
    with dialled(caller, lane) as connection:
        connection.sendall(greeting)
        connection.shutdown(socket.SHUT_WR)
        assert is_closed(connection)
    caller.push(ROWS, epoch=1)


def test_almost_the_ticket_is_none(caller: Caller) -> None:
    _, lane = offered(caller)
    another_end = bytes([lane.ticket[-1] ^ 1])
    for changed in (lane.ticket[:-1], lane.ticket + b"x", lane.ticket[:-1] + another_end, lane.ticket[:8]):
        with dialled(caller, lane) as connection:
            say(connection, pb.BulkHello(ticket=changed))
            assert is_closed(connection)


def test_a_silent_stranger_is_not_waited_for(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "GREETING_SECONDS", 0.2)
    _, lane = offered(caller)
    with dialled(caller, lane) as connection:
        assert is_closed(connection)
    with dialled(caller, lane) as connection:  # nor one that says a byte now and then
        for _ in range(20):
            try:
                connection.sendall(b"\x80")
            except OSError:
                break
            time.sleep(0.05)
        assert is_closed(connection)


def test_there_are_only_so_many_connections(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "MOST_CONNECTIONS", 2)
    _, lane = offered(caller)
    with let_in(caller, lane), let_in(caller, lane):
        with dialled(caller, lane) as third:
            assert is_closed(third)
        caller.push(ROWS, epoch=1)
    eventually(lambda: _is_let_in(caller, lane), bool)


def test_strangers_take_no_place_of_who_has_a_ticket(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "MOST_CONNECTIONS", 3)
    _, lane = offered(caller)
    with ExitStack() as several:
        strangers = [several.enter_context(dialled(caller, lane)) for _ in range(6)]
        assert all(map(is_closed, strangers[:3]))
        for _ in range(3):
            several.enter_context(let_in(caller, lane))
        assert all(map(is_closed, strangers[3:]))
        with dialled(caller, lane) as late:  # all places are taken by who has a ticket
            assert is_closed(late)


def _is_let_in(caller: Caller, lane: pb.BulkLane) -> bool:
    with dialled(caller, lane) as connection:
        try:
            say(connection, pb.BulkHello(ticket=lane.ticket))
            return not is_closed(connection)
        except OSError:
            return False


def damaged(push_id: str) -> pb.WriteRowsRequest:
    (one,) = messages(push_id, ROWS[:5], 0, 5)
    one.crc32c ^= 1
    return one


def infinite(push_id: str) -> pb.WriteRowsRequest:
    rows = ROWS[:5].copy()
    rows[3] = np.nan
    (one,) = messages(push_id, rows, 0, 5)
    return one


REFUSED: list[tuple[str, Callable[[str], pb.WriteRowsRequest], grpc.StatusCode]] = [
    ("damaged", damaged, grpc.StatusCode.DATA_LOSS),
    ("infinite", infinite, grpc.StatusCode.INVALID_ARGUMENT),
    ("elsewhere", lambda _: messages("other", ROWS, 0, 60)[0], grpc.StatusCode.INVALID_ARGUMENT),
    ("outside", lambda push_id: messages(push_id, ROWS, 9, 60)[0], grpc.StatusCode.INVALID_ARGUMENT),
    (
        "shared",
        lambda push_id: pb.WriteRowsRequest(push_id=push_id, shared_row_count=5, loan="s"),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
]


@pytest.mark.parametrize(("name", "wrong", "expected"), REFUSED, ids=[each[0] for each in REFUSED])
def test_what_is_wrong_is_said_though_more_is_under_way(
    either: Caller,
    name: str,
    wrong: Callable[[str], pb.WriteRowsRequest],
    expected: grpc.StatusCode,
) -> None:
    push_id, lane = offered(either)
    with let_in(either, lane) as connection:
        say(connection, wrong(push_id))
        for each in messages(push_id, ROWS, 0, 60) * 2000:  # 8 MB: more than the kernel holds for us
            try:
                say(connection, each)
            except OSError:
                break
        found = status(connection)
    assert code(found) is expected, name
    assert either.state(push_id).state == pb.PUSH_STATE_OPEN


def test_a_field_is_named_as_by_grpc(caller: Caller) -> None:
    push_id, lane = offered(caller)
    with let_in(caller, lane) as connection:
        say(connection, infinite(push_id))
        connection.shutdown(socket.SHUT_WR)
        (packed,) = status(connection).details
    details = error_details_pb2.BadRequest()
    assert packed.Unpack(details)
    assert details.field_violations[0].field == "payload"


def test_rows_that_differ_are_refused_and_the_same_are_not(caller: Caller) -> None:
    push_id, lane = offered(caller, commit_when_complete=False)
    caller.write(push_id, ROWS[:30])
    with let_in(caller, lane) as connection:
        for each in messages(push_id, ROWS, 0, 20):
            say(connection, each)
        connection.shutdown(socket.SHUT_WR)
        assert hear(connection).stored.complete
    with let_in(caller, lane) as connection:
        say(connection, messages(push_id, ROWS[1:], 0, 59)[0])
        connection.shutdown(socket.SHUT_WR)
        assert code(status(connection)) is grpc.StatusCode.ALREADY_EXISTS


def test_a_length_is_looked_at_before_there_is_memory_for_it(caller: Caller) -> None:
    _, lane = offered(caller)
    with let_in(caller, lane) as connection:
        connection.sendall(bulk.varint(1 << 50))
        found = status(connection)
    assert code(found) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "max_message_bytes" in found.message


@pytest.mark.parametrize("garbage", [b"\xff" * 11, bulk.varint(8) + b"\xff" * 8], ids=["length", "message"])
def test_garbage_is_called_that(caller: Caller, garbage: bytes) -> None:
    _, lane = offered(caller)
    with let_in(caller, lane) as connection:
        connection.sendall(garbage)
        assert code(status(connection)) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_half_a_message_is_none(either: Caller, reset: bool) -> None:
    push_id, lane = offered(either)
    first, second = messages(push_id, ROWS, 0, 30)
    with let_in(either, lane) as connection:
        say(connection, first)
        encoded = second.SerializeToString()
        connection.sendall(bulk.varint(len(encoded)) + encoded[:-1])
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    push = eventually(lambda: either.state(push_id), lambda push: push.rows_stored > 0)
    assert [(each.start, each.count) for each in push.stored] == [(0, 30)]
    either.write(push_id, ROWS[30:], 30)
    np.testing.assert_array_equal(either.table(min_epoch=0).ids, brute_force(ROWS, 5))


def begin_message(connection: socket.socket, push_id: str, rows: Any = ROWS, sent: int = 100) -> bytes:
    """Sends the beginning of one message with all rows; what is missing of it."""
    (one,) = messages(push_id, rows, 0, len(rows))
    encoded = one.SerializeToString()
    connection.sendall(bulk.varint(len(encoded)) + encoded[:sent])
    return encoded[sent:]


def test_who_stops_within_a_message_does_not_keep_its_rows(
    start_service: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "STALL_SECONDS", 0.3)
    caller = start_service().caller()
    push_id, lane = offered(caller)
    with let_in(caller, lane) as connection:
        begin_message(connection, push_id)
        found = status(connection)
        assert code(found) is grpc.StatusCode.UNAVAILABLE
        assert "middle of a message" in found.message
    caller.write(push_id, ROWS)
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(ROWS, 5))


def test_rows_that_are_on_their_way_are_waited_for_and_compared(caller: Caller) -> None:
    push_id, lane = offered(caller, commit_when_complete=False)
    with let_in(caller, lane) as slow, let_in(caller, lane) as same, let_in(caller, lane) as other:
        rest = begin_message(slow, push_id)
        time.sleep(0.1)
        say(same, messages(push_id, ROWS, 0, 60)[0])
        say(other, messages(push_id, -ROWS, 0, 60)[0])
        assert caller.state(push_id).rows_stored == 0
        slow.sendall(rest)
        for connection in (slow, same, other):
            connection.shutdown(socket.SHUT_WR)
        assert hear(slow).stored.complete
        assert hear(same).stored.complete
        assert code(status(other)) is grpc.StatusCode.ALREADY_EXISTS
    caller.stub.CommitPush(pb.CommitPushRequest(push_id=push_id), timeout=WAIT)
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(ROWS, 5))


@pytest.mark.parametrize("end", ["abort", "cut", "damage"])
def test_what_came_of_half_a_message_is_in_no_later_push(caller: Caller, end: str) -> None:
    """Its bytes are in a file by then, which becomes that of the next push."""
    wide = random_rows(60, 8192)
    push_id, lane = offered(caller, wide, absent=[7])
    with let_in(caller, lane) as connection:
        rest = begin_message(connection, push_id, wide, wide.nbytes // 2)
        if end == "abort":
            caller.stub.AbortPush(pb.AbortPushRequest(push_id=push_id), timeout=WAIT)
        elif end == "damage":
            connection.sendall(rest[:-1] + bytes([rest[-1] ^ 1]))
            assert code(status(connection)) is grpc.StatusCode.DATA_LOSS
    if end != "abort":
        assert caller.state(push_id).rows_stored == 0
        caller.stub.AbortPush(pb.AbortPushRequest(push_id=push_id), timeout=WAIT)
    push_id, _ = offered(caller, wide, absent=[7], commit_when_complete=False)
    caller.write(push_id, wide[:7])
    caller.write(push_id, wide[8:], 8)
    whole = wide.copy()
    whole[7] = 0  # what never came is zero
    crc = crc32c(whole.tobytes())
    caller.stub.CommitPush(pb.CommitPushRequest(push_id=push_id, rows_crc32c=crc), timeout=WAIT)
    present = np.delete(np.arange(60), 7)
    expected = present[brute_force(wide[present], 5)]
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids[present], expected)


@pytest.mark.parametrize("tail_bytes", [5, 7], ids=["checksum", "checksum and sound"])
@pytest.mark.parametrize("sound", [True, False])
def test_what_is_known_of_rows_may_follow_them(either: Caller, tail_bytes: int, sound: bool) -> None:
    push_id, lane = offered(either)
    half = [bulk.WriteRows(push_id, start, as_bytes(ROWS[start : start + 30])) for start in (0, 30)]
    with let_in(either, lane) as connection:
        for each in half:
            tail = bulk.write_rows_tail(crc32c(each.payload), sound=sound)[:tail_bytes]
            frames.send(connection, bulk.write_rows_head(each), bytes(each.payload) + tail)
        connection.shutdown(socket.SHUT_WR)
        assert hear(connection).stored.complete
    np.testing.assert_array_equal(either.table(min_epoch=0).ids, brute_force(ROWS, 5))


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (bulk.write_rows_tail(1, sound=True), grpc.StatusCode.DATA_LOSS),
        (b"\x28" + bytes(4), grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x25\x00", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x25" + bytes(4) + b"\x25", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x25" + bytes(4) + b"\x40\x02", grpc.StatusCode.INVALID_ARGUMENT),
    ],
    ids=["another", "no checksum", "short", "long", "neither sound nor not"],
)
def test_a_wrong_end_is_refused(caller: Caller, tail: bytes, expected: grpc.StatusCode) -> None:
    push_id, lane = offered(caller)
    message = bulk.WriteRows(push_id, 0, as_bytes(ROWS))
    with let_in(caller, lane) as connection:
        frames.send(connection, bulk.write_rows_head(message), bytes(message.payload) + tail)
        connection.shutdown(socket.SHUT_WR)
        assert code(status(connection)) is expected
    assert caller.state(push_id).rows_stored == 0
    caller.write(push_id, ROWS)
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(ROWS, 5))


@pytest.mark.parametrize("odd", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("sound", [True, False])
def test_rows_that_are_not_sound_reach_no_table(caller: Caller, odd: float, sound: bool) -> None:
    """Whether their sender says so, or the build finds out."""
    rows = ROWS.copy()
    rows[17] = odd
    push_id, lane = offered(caller, rows)
    with let_in(caller, lane) as connection:
        message = bulk.WriteRows(push_id, 0, as_bytes(rows))
        tail = bulk.write_rows_tail(crc32c(message.payload), sound=sound)
        frames.send(connection, bulk.write_rows_head(message), bytes(message.payload) + tail)
        connection.shutdown(socket.SHUT_WR)
        reply = hear(connection)
    if sound:
        assert reply.WhichOneof("outcome") == "stored"
        assert caller.ended(push_id).state == pb.PUSH_STATE_FAILED
    else:
        told = status_pb2.Status.FromString(reply.status)
        assert told.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert "row 17" in told.message
    assert caller.generations() == []


def test_a_push_that_is_aborted_meanwhile_takes_nothing_more(caller: Caller) -> None:
    push_id, lane = offered(caller)
    first, second = messages(push_id, ROWS, 0, 30)
    with let_in(caller, lane) as connection:
        say(connection, first)
        eventually(lambda: caller.state(push_id).rows_stored, bool)
        caller.stub.AbortPush(pb.AbortPushRequest(push_id=push_id), timeout=WAIT)
        say(connection, second)
        connection.shutdown(socket.SHUT_WR)
        assert code(status(connection)) is grpc.StatusCode.FAILED_PRECONDITION


def test_a_stream_that_goes_silent_is_ended(start_service: Start) -> None:
    caller = start_service(limits=Limits(max_stream_idle_seconds=1)).caller()
    push_id, lane = offered(caller)
    with let_in(caller, lane) as connection:
        say(connection, messages(push_id, ROWS, 0, 30)[0])
        found = status(connection)
    assert code(found) is grpc.StatusCode.UNAVAILABLE
    assert "max_stream_idle_seconds" in found.message


def test_a_service_that_stops_ends_its_lane(start_service: Start, tmp_path: Path) -> None:
    service = start_service(drain_seconds=0.1)
    caller = service.caller()
    _, lane = offered(caller)
    path = tmp_path / "nearkin.sock.bulk"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with let_in(caller, lane) as connection:
        stopping = threading.Thread(target=service.stop)
        stopping.start()
        assert is_closed(connection)
        stopping.join()
    assert not path.exists()


def test_a_lane_that_a_dead_service_left_is_replaced(start_service: Start, tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "nearkin.sock.bulk"))
    left.close()
    caller = start_service().caller()
    _, lane = offered(caller)
    with let_in(caller, lane):
        pass


def test_there_may_be_none(start_service: Start, tmp_path: Path) -> None:
    caller = start_service(bulk_port=None).caller()
    assert not offered(caller)[1].ticket
    assert not (tmp_path / "nearkin.sock.bulk").exists()


def test_to_ask_for_the_answer_alone_leaves_the_ticket_good(either: Caller) -> None:
    either.push(ROWS)
    table = either.table(min_epoch=0)
    asked = pb.ReadTableRequest(run="run", accept_bulk_lane=True, accept_shared_memory=True)
    headers = [next(either.stub.ReadTable(asked, timeout=WAIT)).header]
    lanes = [offered(either, epoch=1)[1], *(each.bulk_lane for each in headers if each.bulk_lane.ticket)]
    for lane in lanes:
        for _ in range(3):
            with dialled(either, lane) as connection:
                say(connection, pb.BulkHello(ticket=lane.ticket, only_answer=True))
                assert hear(connection).answer == lane.answer
                assert is_closed(connection)
    with let_in(either, lanes[0]):
        pass
    if len(lanes) > 1:
        with let_in(either, lanes[1]) as connection:
            assert hear(connection).block.payload == table.ids.tobytes()


def test_a_stranger_is_given_no_answer(either: Caller) -> None:
    _, lane = offered(either)
    for only_answer in (False, True):
        with dialled(either, lane) as connection:
            say(connection, pb.BulkHello(ticket=lane.ticket[:-1] + b"x", only_answer=only_answer))
            assert is_closed(connection)


def test_no_port_means_no_other_door_either(start_service: Start) -> None:
    caller = start_service(listen=("127.0.0.1:0",), bulk_port=None).caller()
    assert not offered(caller, accept_shared_memory=True, row_count=1)[1].ticket


def test_who_does_not_ask_gets_no_ticket(caller: Caller) -> None:
    assert not caller.begin(ROWS).HasField("bulk_lane")


def test_a_port_that_is_taken_is_named(start_service: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--bulk-port {port}"):
            start_service(listen=("127.0.0.1:0",), bulk_port=port)


def test_no_ticket_is_in_the_log(caller: Caller, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    push_id, lane = offered(caller)
    with dialled(caller, lane) as connection:
        say(connection, pb.BulkHello(ticket=lane.ticket[:-1]))
        assert is_closed(connection)
    with let_in(caller, lane) as connection:
        say(connection, damaged(push_id))
        connection.shutdown(socket.SHUT_WR)
        status(connection)
    for secret in (lane.ticket, lane.ticket[:-1], lane.answer):
        assert secret.hex() not in caplog.text
        assert repr(secret) not in caplog.text


def test_tickets_end() -> None:
    grant = RowsGrant("p")
    tickets = Tickets(seconds=60)
    ticket = tickets.issue(grant)
    assert tickets.redeem(ticket.shown) is ticket
    assert repr(ticket.shown) not in repr(ticket)
    assert tickets.redeem(b"") is None
    short = Tickets(seconds=0)
    assert short.redeem(short.issue(grant).shown) is None


def test_only_so_many_tickets_are_good() -> None:
    tickets = Tickets(seconds=60)
    first, second = (tickets.issue(RowsGrant(name)) for name in "ab")
    tickets.redeem(first.shown)
    for _ in range(4095):
        tickets.issue(RowsGrant("more"))
    assert tickets.redeem(second.shown) is None
    assert tickets.redeem(first.shown) is first


def test_readers_push_no_writer_out() -> None:
    tickets = Tickets(seconds=60)
    writer, reader = tickets.issue(RowsGrant("p")), tickets.issue(TABLE)
    for _ in range(4096):
        tickets.issue(TABLE)
    assert tickets.redeem(reader.shown) is None
    assert tickets.redeem(writer.shown) is writer


def test_a_table_that_is_read_otherwise_needs_no_ticket(
    either: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued: list[Any] = []
    issue = Tickets.issue

    def noting(self: Tickets, grant: Any) -> Any:
        issued.append(grant)
        return issue(self, grant)

    monkeypatch.setattr(Tickets, "issue", noting)
    either.push(ROWS)
    header = _answers(either, accept_shared_memory=True)[0].header
    assert len(issued) == header.HasField("bulk_lane") == header.bulk_lane.HasField("local")
    assert bool(header.ids_path) == (either.address.startswith("unix:") or bool(issued))


def test_the_log_names_the_door_for_this_host(start_service: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nearkin.lane")
    lane = offered(start_service(listen=("127.0.0.1:0",)).caller())[1]
    assert f"from this host, TLS or not: @{lane.local.name}" in caplog.text


def test_where_there_can_be_no_such_door_none_is_offered(
    start_service: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "nearkin.lane")

    def forbidden() -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("nearkin_service.listening.local_socket", forbidden)
    lane = offered(start_service(listen=("127.0.0.1:0",)).caller())[1]
    assert lane.ticket
    assert not lane.HasField("local")
    assert "no bulk lane for callers over TCP from this host: Permission denied" in caplog.text


# -------------------------------------------------------------------------------------------------- tables

TALL = random_rows(1500, 4)


@pytest.fixture
def tall(either: Caller) -> Caller:
    """With a table of some megabytes, in several blocks."""
    either.push(TALL, k=700)
    return either


def ticket_for_table(caller: Caller, **request: Any) -> pb.TableHeader:
    asked = pb.ReadTableRequest(run="run", with_scores=True, accept_bulk_lane=True)
    asked.MergeFrom(pb.ReadTableRequest(**request))
    header, *blocks = [*caller.stub.ReadTable(asked, timeout=WAIT)]
    assert not blocks
    return header.header


def read(connection: socket.socket, header: pb.TableHeader) -> Any:
    def responses() -> Iterator[pb.ReadTableResponse]:
        yield pb.ReadTableResponse(header=header)
        while data := frames.receive(connection, most=1 << 30):
            yield pb.ReadTableResponse(block=pb.BulkReply.FromString(data).block)

    return read_table(responses())


@pytest.mark.parametrize("rows", [(0, 0), (0, 1500), (1, 1400), (749, 3)])
def test_a_table_comes_as_by_grpc(tall: Caller, rows: tuple[int, int]) -> None:
    asked = {"row_start": rows[0], "row_count": rows[1]}
    expected = tall.table(**asked)
    if expected.ids.nbytes * 2 < 1 << 20:
        assert not any(each.header.HasField("bulk_lane") for each in _answers(tall, **asked)), "few bytes"
        return
    header = ticket_for_table(tall, **asked)
    with let_in(tall, header.bulk_lane) as connection:
        found = read(connection, header)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.scores, expected.scores)


def _answers(caller: Caller, **request: Any) -> list[pb.ReadTableResponse]:
    asked = pb.ReadTableRequest(run="run", with_scores=True, accept_bulk_lane=True, **request)
    return list(caller.stub.ReadTable(asked, timeout=WAIT))


def test_a_table_is_given_once_for_a_ticket(tall: Caller) -> None:
    header = ticket_for_table(tall)
    with let_in(tall, header.bulk_lane) as connection:
        read(connection, header)
    with dialled(tall, header.bulk_lane) as connection:
        say(connection, pb.BulkHello(ticket=header.bulk_lane.ticket))
        assert is_closed(connection)


def test_a_generation_that_was_removed_meanwhile_is_not_found(tall: Caller) -> None:
    header = ticket_for_table(tall)
    tall.stub.DeleteGeneration(pb.DeleteGenerationRequest(run="run", generation=1), timeout=WAIT)
    with let_in(tall, header.bulk_lane) as connection:
        assert code(status(connection)) is grpc.StatusCode.NOT_FOUND


def test_a_slow_reader_holds_nobody_up_and_reads_what_was_removed(tall: Caller) -> None:
    expected = tall.table()
    header = ticket_for_table(tall)
    with let_in(tall, header.bulk_lane) as connection:
        first = connection.recv(10, socket.MSG_PEEK)  # its sending has begun: the rest does not fit anywhere
        assert first
        for _ in range(3):
            other = ticket_for_table(tall)
            with let_in(tall, other.bulk_lane) as quick:
                read(quick, other)
        tall.stub.DeleteGeneration(pb.DeleteGenerationRequest(run="run", generation=1), timeout=WAIT)
        found = read(connection, header)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_a_reader_that_takes_nothing_is_left(start_service: Start) -> None:
    service = start_service(limits=Limits(max_stream_idle_seconds=1))
    caller = service.caller()
    caller.push(random_rows(3000, 4), k=1500)
    header = ticket_for_table(caller)
    with let_in(caller, header.bulk_lane) as connection:
        eventually(lambda: service.server._lane._connections, lambda left: not left)
        taken = 0
        while data := connection.recv(1 << 20):
            taken += len(data)
        assert taken < 8 * 3000 * 1500


def test_a_reader_that_leaves_is_no_error(tall: Caller, caplog: pytest.LogCaptureFixture) -> None:
    header = ticket_for_table(tall)
    with let_in(tall, header.bulk_lane):
        pass
    tall.table()
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


def test_a_borrower_may_send_his_rows_all_the_same(
    start_service: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One who cannot open the file names his loan, and so does not wait for it to end."""
    monkeypatch.setattr(lending, "UNUSED_SECONDS", 10 * WAIT)
    caller = start_service(listen=(f"unix://{tmp_path}/socket",)).caller()
    asked = {"accept_bulk_lane": True, "accept_shared_memory": True, "row_count": len(ROWS)}
    begun = caller.begin(ROWS, **asked)
    with let_in(caller, begun.bulk_lane) as connection:
        for each in messages(begun.push.push_id, ROWS, 0, 20):
            each.loan = begun.lent_rows.loan
            say(connection, each)
        connection.shutdown(socket.SHUT_WR)
        assert hear(connection).stored.complete
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(ROWS, 5))


def test_a_loan_that_there_is_not_is_refused_on_the_lane_too(start_service: Start, tmp_path: Path) -> None:
    caller = start_service(listen=(f"unix://{tmp_path}/socket",)).caller()
    push_id, lane = offered(caller)
    with let_in(caller, lane) as connection:
        (each,) = messages(push_id, ROWS, 0, 60)
        each.loan = "no-such-loan"
        say(connection, each)
        status = status_pb2.Status.FromString(hear(connection).status)
    assert status.message.startswith("loan")
    assert caller.state(push_id).rows_stored == 0
