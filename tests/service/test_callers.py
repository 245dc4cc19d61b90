"""Callers that misbehave, by mistake or on purpose: a clear status, a bounded cost, and no harm to others."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service.access import TlsFiles
from nearkin_service.config import Limits

from tests.service.conftest import (
    WAIT,
    Authority,
    Caller,
    Service,
    brute_force,
    code_of,
    eventually,
    message,
    random_rows,
    refusal,
)

Start = Callable[..., Service]
ROWS = random_rows(60, 8)
BIG = 2**63 - 1
METHODS = list(pb.DESCRIPTOR.services_by_name["NeighbourService"].methods)
OUR_MISTAKES = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


def still_serves(caller: Caller) -> None:
    """A whole epoch, right, and soon."""
    began = time.monotonic()
    caller.push(ROWS, run="bystander", epoch=time.monotonic_ns())
    table = caller.table(run="bystander")
    np.testing.assert_array_equal(table.ids, brute_force(ROWS, 5))
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": BIG},
        {"num_classes": -1},
        {"num_classes": 2**32 + 60},
        {"row_shape": [BIG]},
        {"row_shape": [2**31, 2**31, 2**31]},
        {"row_shape": [-8]},
        {"row_shape": [0]},
        {"row_shape": [1] * 10_000},
        {"k": 2**31 - 1},
        {"k": -5},
        {"epoch": -1},
        {"dtype": 77},
        {"key": 77},
        {"absent": [BIG]},
        {"absent": [-1]},
        {"run": "../../etc"},
        {"run": "a" * 65},
        {"run": ""},
        {"run": "nul\0"},
        {"engine": "x" * 10_000},
        {"qaconv_candidates": -1},
        {"accept_shared_memory": True, "row_start": 58, "row_count": 3},
    ],
    ids=",".join,
)
def test_hostile_pushes_are_refused(caller: Caller, changes: dict[str, Any]) -> None:
    error = refusal(lambda: caller.begin(ROWS, **changes))
    assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert len(str(error.details())) < 2_500
    assert caller.stub.ListRuns(pb.ListRunsRequest(), timeout=WAIT).runs == []


@pytest.mark.parametrize("start", [-1, 60, BIG, -BIG, 2**62])
def test_rows_from_nowhere_are_refused(caller: Caller, start: int) -> None:
    push_id = caller.begin(ROWS).push.push_id
    error = refusal(lambda: caller.write(push_id, ROWS[:1], start=start))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "push_id", ["", "x", "../../../etc/passwd", "f" * 24, "F" * 24, "\0" * 24, "f" * 100_000]
)
def test_wrong_push_ids_are_not_found(caller: Caller, push_id: str) -> None:
    for call in (
        lambda: caller.state(push_id),
        lambda: caller.stub.CommitPush(pb.CommitPushRequest(push_id=push_id), timeout=WAIT),
        lambda: caller.stub.AbortPush(pb.AbortPushRequest(push_id=push_id), timeout=WAIT),
        lambda: caller.write(push_id, ROWS),
    ):
        assert refusal(call).code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)


@pytest.mark.parametrize(
    "request_",
    [
        {"k": 2**31 - 1},
        {"k": -1},
        {"classes": pb.ClassIds(ids=[BIG])},
        {"classes": pb.ClassIds(ids=[1] * 100_000)},
        {"vectors": pb.Vectors(count=BIG, dtype=pb.DTYPE_FLOAT32, payload=b"1234")},
        {"vectors": pb.Vectors(count=-1, dtype=pb.DTYPE_FLOAT32)},
        {"vectors": pb.Vectors(count=1, dtype=9, payload=bytes(32))},  # type: ignore[arg-type]
        {"generation": -BIG},
        {"generation": BIG},
    ],
    ids=str,
)
def test_hostile_questions_are_refused(caller: Caller, request_: dict[str, Any]) -> None:
    caller.push(ROWS)
    classes = {} if "vectors" in request_ else {"classes": pb.ClassIds(ids=[1])}
    request = pb.NearestRequest(**{"run": "run"} | classes | request_)
    error = refusal(lambda: caller.stub.Nearest(request, timeout=WAIT))
    assert code_of(error) not in OUR_MISTAKES


def test_a_stalled_stream_ends_and_what_it_sent_stays(start_service: Start) -> None:
    caller = start_service(limits=Limits(max_stream_idle_seconds=1)).caller()
    push_id = caller.begin(ROWS).push.push_id
    released = threading.Event()

    def stalling() -> Iterator[pb.WriteRowsRequest]:
        yield message(push_id, ROWS[:10], 0)
        released.wait(WAIT)

    error = refusal(lambda: caller.stub.WriteRows(stalling(), timeout=WAIT))
    released.set()
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "max_stream_idle_seconds" in str(error.details())
    assert caller.state(push_id).rows_stored == 10
    caller.write(push_id, ROWS[10:], start=10)
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(ROWS, 5))


def test_a_thousand_idle_connections(start_service: Start) -> None:
    """Half of them send nothing, half of them nonsense; the others go on as if they were not there."""
    service = start_service(listen=("127.0.0.1:0",), http="127.0.0.1:0")
    caller = service.caller()
    threads = threading.active_count()
    address = service.server.addresses[0].rpartition(":")
    idle = []
    try:
        for number in range(1000):
            idle.append(socket.create_connection((address[0], int(address[2])), timeout=WAIT))
            if number % 2:
                idle[-1].sendall(os.urandom(200))
        still_serves(caller)
        assert threading.active_count() < threads + 20
    except OSError as error:
        if error.errno != 24:
            raise
        pytest.skip("this process may not open enough sockets")
    finally:
        for connection in idle:
            connection.close()


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
def test_idle_http_connections_keep_no_probe_out(
    start_service: Start, authority: Authority, *, encrypted: bool
) -> None:
    """Five hundred that say nothing, or half a request: a probe gets in, and there are few threads."""
    tls = TlsFiles(authority.file("service.pem"), authority.file("service.key")) if encrypted else None
    service = start_service(http="127.0.0.1:0", tls=tls)
    assert service.server.http_address is not None
    host, _, port = service.server.http_address.rpartition(":")
    scheme, context = "http", None
    if encrypted:
        scheme, context = "https", ssl.create_default_context(cafile=authority.file("ca.pem"))
    before = threading.active_count()
    idle = []
    for number in range(500):
        idle.append(socket.create_connection((host, int(port)), timeout=WAIT))
        if number % 2:
            idle[-1].sendall(b"GET /livez HTTP/1.1\r\nHost")
        if number % 100 == 99:
            address = f"{scheme}://{service.server.http_address}/livez"
            with urllib.request.urlopen(address, timeout=5, context=context) as reply:
                assert reply.status == 200
    assert threading.active_count() <= before + 70
    for connection in idle:
        connection.close()
    eventually(threading.active_count, lambda count: count <= before + 2)


def test_a_flood_of_chunks_stays_within_memory(start_service: Start) -> None:
    """Sixty-four streams at once, each of large messages for rows that are there already."""
    caller = start_service().caller()
    rows = random_rows(2048, 1024)
    push_id = caller.begin(rows, commit_when_complete=False).push.push_id
    caller.write(push_id, rows, step=512)
    before = memory()
    messages = [message(push_id, rows[:1024], 0)] * 4
    calls = [caller.stub.WriteRows.future(iter(messages), timeout=120) for _ in range(64)]
    highest = 0
    while not all(call.done() for call in calls):
        highest = max(highest, memory())
        time.sleep(0.02)
    assert {call.code() for call in calls} == {grpc.StatusCode.OK}
    assert highest - before < 2 << 30
    still_serves(caller)


def memory() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def test_slow_readers_hold_up_nobody(caller: Caller) -> None:
    rows = random_rows(3000, 4)
    caller.push(rows, k=2000)
    slow = [caller.stub.ReadTable(pb.ReadTableRequest(run="run", with_scores=True)) for _ in range(40)]
    for stream in slow:
        next(stream)
    still_serves(caller)
    for stream in slow:
        stream.cancel()


def test_readers_that_take_nothing_make_room(start_service: Start) -> None:
    """They hold the places of their own run only, and not for ever."""
    limits = Limits(max_stream_idle_seconds=3, max_table_streams=4)
    service = start_service(limits=limits, http="127.0.0.1:0")
    caller = service.caller()
    caller.push(random_rows(3000, 4), k=2000)
    deaf = [caller.stub.ReadTable(pb.ReadTableRequest(run="run", with_scores=True)) for _ in range(2)]
    for stream in deaf:
        next(stream)
    assert refusal(
        lambda: list(service.caller().stub.ReadTable(pb.ReadTableRequest(run="run"), timeout=0.5))
    ).code() is (grpc.StatusCode.DEADLINE_EXCEEDED)
    still_serves(service.caller())
    assert service.caller().table().ids.shape == (3000, 2000)
    for stream in deaf:
        assert "max_stream_idle_seconds" in str(refusal(lambda: list(stream)).details())  # noqa: B023


def test_readers_that_go_away_are_no_errors(start_service: Start, caplog: pytest.LogCaptureFixture) -> None:
    service = start_service()
    service.caller().push(random_rows(3000, 4), k=2000)
    for _ in range(5):
        passing = Caller(service.server.addresses[0])
        streams = [passing.stub.ReadTable(pb.ReadTableRequest(run="run")) for _ in range(20)]
        for stream in streams:
            next(stream)
        passing.channel.close()
    still_serves(service.caller())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


fuzzing = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
numbers = st.sampled_from([0, 1, -1, 5, 59, 60, 61, 2**31 - 1, -(2**31)])
large = numbers | st.sampled_from([BIG, -BIG - 1, 2**32, 2**40])


def fill(message_type: Any, data: st.DataObject, depth: int = 0) -> Any:
    """A message whose fields hold the values that break things."""
    made = message_type()
    for field in message_type.DESCRIPTOR.fields:
        if not data.draw(st.booleans()) or depth > 2:
            continue
        if field.message_type is not None:
            inner = fill(type(getattr(made, field.name)), data, depth + 1) if not field.is_repeated else None
            if inner is not None:
                getattr(made, field.name).CopyFrom(inner)
            continue
        value = data.draw(VALUES[field.cpp_type])
        if field.type == field.TYPE_BYTES:
            value = value.encode("utf-8", "ignore")
        if field.is_repeated:
            getattr(made, field.name).extend([value] * data.draw(st.integers(0, 4)))
        else:
            setattr(made, field.name, value)
    return made


names = st.sampled_from(["run", "bystander", "", "..", "/", "run\n", "é", "a" * 300]) | st.text(max_size=8)
VALUES: dict[int, st.SearchStrategy[Any]] = {
    1: numbers,
    2: large,
    3: st.integers(0, 2**32 - 1),
    4: st.integers(0, 2**64 - 1),
    5: st.floats(),
    6: st.floats(width=32),
    7: st.booleans(),
    8: st.integers(0, 3),
    9: names | st.binary(max_size=24).map(lambda raw: raw.decode("latin-1")),
    10: st.integers(0, 5),
}


def sent(caller: Caller, method: Any, raw: bytes) -> grpc.StatusCode:
    """How a call with these bytes as its request ends."""
    path, channel = f"/nearkin.v1.NeighbourService/{method.name}", caller.channel
    multi: Any = channel
    try:
        if method.client_streaming:
            multi.stream_unary(path)(iter([raw, raw]), timeout=0.5)
        elif method.server_streaming:
            for _, _reply in zip(range(3), multi.unary_stream(path)(raw, timeout=0.5), strict=False):
                pass
        else:
            multi.unary_unary(path)(raw, timeout=WAIT)
    except grpc.RpcError as error:
        return code_of(error)
    return grpc.StatusCode.OK


@fuzzing
@given(data=st.data())
def test_any_message_gets_a_meaningful_status(caller: Caller, data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(METHODS), "method")
    message_type = getattr(pb, method.input_type.name)
    code = sent(caller, method, fill(message_type, data).SerializeToString())
    assert code not in OUR_MISTAKES


@fuzzing
@given(data=st.data(), raw=st.binary(max_size=200))
def test_any_bytes_get_a_meaningful_status(caller: Caller, data: st.DataObject, raw: bytes) -> None:
    method = data.draw(st.sampled_from(METHODS), "method")
    assert sent(caller, method, raw) not in OUR_MISTAKES
