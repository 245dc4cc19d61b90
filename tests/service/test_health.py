"""gRPC's health on threads of its own: the same answers, whatever the event loop is busy with."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service.access import Scope, TokenFile

from tests.service.conftest import WAIT, Service, code_of, eventually, random_rows

Start = Callable[..., Service]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE = "nearkin.v1.NeighbourService"


@pytest.fixture(params=["unix", "tcp"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"unix://{tmp_path}/health.sock" if request.param == "unix" else "127.0.0.1:0"


@contextmanager
def asking(service: Service) -> Iterator[Callable[..., Any]]:
    address = service.server.health_address
    assert address is not None
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        def ask(name: str = "", **how: Any) -> Any:
            request = health_pb2.HealthCheckRequest(service=name)
            try:
                return stub.Check(request, timeout=WAIT, **how).status
            except grpc.RpcError as error:
                return code_of(error).name

        yield ask


def test_overall_and_of_each_run(start_service: Start, place: str) -> None:
    service = start_service(health=place)
    caller = service.caller()
    caller.push(random_rows(20, 4), run="faces")
    caller.begin(random_rows(20, 4), 0, run="plants")
    caller.begin(random_rows(20, 4), 0, run="animals", k=3)
    with asking(service) as ask:
        assert [ask(), ask(SERVICE), ask("run/faces"), ask("run/plants")] == [SERVING] * 4
        assert ask("run/nobody") == "NOT_FOUND"
        assert ask("else") == "NOT_FOUND"
        zero = random_rows(20, 4)
        zero[3] = 0
        with pytest.raises(grpc.RpcError):
            caller.push(zero, epoch=1, run="plants")
        assert ask("run/plants") == NOT_SERVING
        assert ask() == SERVING


def test_it_answers_while_the_event_loop_stands(start_service: Start, place: str) -> None:
    service = start_service(health=place)
    caller = service.caller()
    with asking(service) as ask:
        assert ask() == SERVING
        go_on = threading.Event()
        service._loop.call_soon_threadsafe(go_on.wait, WAIT)
        try:
            began = time.monotonic()
            assert [ask() for _ in range(50)] == [SERVING] * 50
            assert time.monotonic() - began < WAIT / 2, "it waited for the event loop"
            with pytest.raises(grpc.RpcError):
                caller.stub.ListRuns(pb.ListRunsRequest(), timeout=0.2)
        finally:
            go_on.set()
        caller.push(random_rows(20, 4))


def test_a_loop_that_stands_for_long_is_said(start_service: Start, place: str) -> None:
    service = start_service(health=place)
    with asking(service) as ask:
        service.server._beat = time.monotonic() - 60
        assert ask() == NOT_SERVING
        eventually(ask, lambda status: status == SERVING)  # it has moved on


def test_draining_is_said_first(start_service: Start, place: str) -> None:
    service = start_service(health=place, drain_seconds=20)
    caller = service.caller()
    caller.push(random_rows(20, 4))
    with asking(service) as ask, grpc.insecure_channel(str(service.server.health_address)) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=WAIT)
        assert next(watching).status == SERVING
        assert ask() == SERVING
        stopping = threading.Thread(target=service.stop)
        stopping.start()
        assert next(watching).status == NOT_SERVING
        stopping.join()
    if place.startswith("unix"):
        assert not Path(place.removeprefix("unix://")).exists()


def test_the_state_of_a_run_is_for_its_readers(start_service: Start, tmp_path: Path) -> None:
    token = TokenFile(tmp_path / "tokens.json").create(Scope.READ, ("faces",))
    service = start_service(health="127.0.0.1:0", token_file=tmp_path / "tokens.json")
    service.caller().push(random_rows(20, 4), run="faces")
    service.caller().push(random_rows(20, 4), run="animals")
    shown = [("authorization", f"Bearer {token}")]
    with asking(service) as ask:
        assert ask() == SERVING
        assert ask("run/faces") == "UNAUTHENTICATED"
        assert ask("run/faces", metadata=shown) == SERVING
        assert ask("run/animals", metadata=shown) == "PERMISSION_DENIED"
        assert ask("run/faces", metadata=[("authorization", "Bearer nk_wrong")]) == "UNAUTHENTICATED"


def test_its_socket_is_its_owners_alone(start_service: Start, tmp_path: Path) -> None:
    start_service(health=f"unix://{tmp_path}/health.sock")
    assert stat.S_IMODE((tmp_path / "health.sock").stat().st_mode) == 0o600


def test_it_opens_no_door_to_other_machines(start_service: Start) -> None:
    with pytest.raises(ValueError, match="other machines"):
        start_service(health="0.0.0.0:0")


def test_nothing_else_is_served_there(start_service: Start, place: str) -> None:
    service = start_service(health=place)
    service.caller().push(random_rows(20, 4))
    with grpc.insecure_channel(str(service.server.health_address)) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ListRuns", pb.ListRunsRequest.SerializeToString, bytes)
        with pytest.raises(grpc.RpcError) as refused:
            call(pb.ListRunsRequest(), timeout=WAIT)
        assert code_of(refused.value) is grpc.StatusCode.UNIMPLEMENTED
    assert service.caller().generation().generation == 1
