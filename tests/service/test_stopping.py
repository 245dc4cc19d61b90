"""A stop waits for builds and for answers that end, and for nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service import engines

from tests.service.conftest import WAIT, Caller, Service, eventually, random_rows, refusal

Start = Callable[..., Service]
ROWS = random_rows(60, 8)
DRAIN_SECONDS = 20.0


class HeldEngines:
    """The engines, whose builds wait."""

    def __init__(self) -> None:
        self.building, self.go_on = threading.Event(), threading.Event()

    def build_table(self, *arguments: Any) -> Any:
        self.building.set()
        assert self.go_on.wait(WAIT)
        return engines.build_table(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(engines, name)


@contextmanager
def stopping(service: Service) -> Iterator[threading.Thread]:
    """The service drains, and the thread lives until it has ended; the callers' connections stay."""
    service.callers.clear()
    thread = threading.Thread(target=service.stop)
    thread.start()
    eventually(lambda: service.server.core.draining, bool)
    yield thread
    thread.join(WAIT)
    assert not thread.is_alive()


def watch(caller: Caller) -> Any:
    return caller.stub.WatchRun(pb.WatchRunRequest(run="run"), timeout=WAIT)


def test_who_comes_back_to_watch_while_a_build_ends_holds_up_nobody(start_service: Start) -> None:
    """As `NeighbourClient.watch` does: its first watch was told that the service is stopping."""
    held = HeldEngines()
    service = start_service(held, drain_seconds=DRAIN_SECONDS)
    caller = service.caller()
    caller.write(caller.begin(ROWS).push.push_id, ROWS)
    assert held.building.wait(WAIT)
    with stopping(service):
        again = watch(caller)
        error = refusal(lambda: list(again))
        held.go_on.set()
        began = time.monotonic()
    assert time.monotonic() - began < DRAIN_SECONDS / 2
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "stopping" in (error.details() or "")
    assert start_service().caller().generation().generation == 1
    caller.channel.close()


def test_who_watches_health_is_told_and_holds_up_nobody(start_service: Start) -> None:
    service = start_service(drain_seconds=DRAIN_SECONDS)
    caller = service.caller()
    stub = health_pb2_grpc.HealthStub(caller.channel)
    watches = [
        stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=WAIT) for name in ("", "", "?")
    ]
    serving, not_serving, unknown = (
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
        health_pb2.HealthCheckResponse.SERVICE_UNKNOWN,
    )
    assert [next(each).status for each in watches] == [serving, serving, unknown]
    watches.pop(0).cancel()  # who leaves takes nobody along
    began = time.monotonic()
    with stopping(service):
        assert next(watches[0]).status == not_serving
        codes = [refusal(partial(next, each)).code() for each in watches]
        assert codes == [grpc.StatusCode.UNAVAILABLE] * 2
    assert time.monotonic() - began < DRAIN_SECONDS / 2
    caller.channel.close()
