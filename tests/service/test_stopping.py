"""A stop waits for builds and for answers that end, and for nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service import engines

from tests.service.conftest import WAIT, Caller, Service, Serving, eventually, message, random_rows, refusal

Start = Callable[..., Service]
Serve = Callable[..., Serving]
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


def test_who_keeps_asking_what_is_served_holds_up_nobody(start_service: Start) -> None:
    service = start_service(drain_seconds=DRAIN_SECONDS)
    caller, left = service.caller(), threading.Event()

    def asking() -> Iterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        left.wait(WAIT)

    answers = reflection_pb2_grpc.ServerReflectionStub(caller.channel).ServerReflectionInfo(asking())
    assert len(next(answers).list_services_response.service) == 3
    began = time.monotonic()
    with stopping(service):
        assert not list(answers)
    assert time.monotonic() - began < DRAIN_SECONDS / 2
    left.set()
    caller.channel.close()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_whoever_asks_again_changes_nothing(serve: Serve, second: signal.Signals) -> None:
    serving = serve()
    serving.caller().push(ROWS)
    serving.process.send_signal(signal.SIGTERM)
    while serving.process.poll() is None:
        serving.process.send_signal(second)
        time.sleep(0.001)
    assert serving.process.returncode == 0, serving.log.read_text()
    assert "Traceback" not in serving.log.read_text()
    assert serve().caller().generation().generation == 1


SLOW_START = """
import sys, time
from nearkin_service import cli, engines, store

def slow(*_, **__):
    print("here", flush=True)
    time.sleep(60)

{place} = slow
cli.main()
"""


@contextmanager
def slowed(serving: Serving, place: str, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Another process with the data and address of one that has ended; it says "here" and stays there."""
    data, log = serving.log.parent / "data", serving.log.with_name("slowed.log")
    command = [sys.executable, "-c", SLOW_START.format(place=place), "--data-dir", str(data)]
    options = ("--listen", serving.address, "--device", "cpu", *options)
    with log.open("w") as errors:
        process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=errors)
    try:
        yield process, log
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def said(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("place", ["cli.allow_many_connections", "store.DataDirectory.recover"])
@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_does_not_wait_for_a_start(serve: Serve, place: str, asked: signal.Signals) -> None:
    """To read all tables of a large directory takes minutes."""
    first = serve()
    first.caller().push(ROWS)
    first.terminate()
    with slowed(first, place) as (process, log):
        assert b"here" in said(process)
        process.send_signal(asked)
        assert process.wait(WAIT) == 0
    assert "Traceback" not in log.read_text()
    assert serve().caller().generation().generation == 1


def test_what_the_next_service_makes_is_not_removed(start_service: Start, tmp_path: Path) -> None:
    """It may begin as soon as the directory is given back."""
    service = start_service()
    left: list[Path] = []
    directory = service.server.core.directory
    close = directory.close

    def closing() -> None:
        left.extend(tmp_path.glob("*.sock*"))
        close()

    directory.close = closing  # type: ignore[method-assign]
    assert len(list(tmp_path.glob("*.sock*"))) == 2
    service.stop()
    assert not left


def test_a_ready_file_is_there_only_while_the_service_is_ready(serve: Serve, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    first = serve("--ready-file", str(ready), "--drain-seconds", "20")
    caller = first.caller()
    push_id, go_on = caller.begin(ROWS).push.push_id, threading.Event()

    def slow() -> Iterator[pb.WriteRowsRequest]:
        yield message(push_id, ROWS[:30], 0)
        go_on.wait(WAIT)
        yield message(push_id, ROWS[30:], 30)

    writing = caller.stub.WriteRows.future(slow(), timeout=WAIT)
    eventually(lambda: caller.state(push_id).rows_stored, lambda stored: stored == 30)
    first.process.send_signal(signal.SIGTERM)
    eventually(ready.exists, lambda there: not there)
    assert first.process.poll() is None
    go_on.set()
    assert writing.result().complete
    assert first.process.wait(WAIT) == 0
    ready.write_text("of a service that was killed")
    with slowed(first, "store.DataDirectory.recover", "--ready-file", str(ready)) as (process, _):
        assert b"here" in said(process)
        assert not ready.exists()
    assert serve("--ready-file", str(ready)).caller().table(min_epoch=0).generation.generation == 1
    assert ready.read_text().startswith("unix:")


def test_work_for_a_caller_who_was_given_up_fails_without_a_word(
    start_service: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes on behind the stop, as far as the threads go."""
    service = start_service(drain_seconds=0.1)
    caller, core = service.caller(), service.server.core
    caller.push(ROWS)
    begun, create = threading.Event(), core.directory.create_push

    def slow(*arguments: Any) -> Any:
        begun.set()
        eventually(lambda: core._closed, bool)
        return create(*arguments)

    core.directory.create_push = slow  # type: ignore[method-assign,assignment]
    beginning = threading.Thread(target=refusal, args=(lambda: caller.begin(ROWS, 1),))
    beginning.start()
    assert begun.wait(WAIT)
    with stopping(service):
        pass
    beginning.join(WAIT)
    assert not [each for each in caplog.records if each.levelname == "ERROR"]
    assert start_service().caller().begin(ROWS, 1).push.state == pb.PUSH_STATE_OPEN
    caller.channel.close()


@pytest.mark.parametrize(
    "place", ["engines.open_searcher", "engines.build_table", "store.DataDirectory.flush"]
)
def test_a_stop_does_not_wait_for_what_cannot_be_broken_off(serve: Serve, place: str) -> None:
    """For gigabytes to reach the disk, or for a search through them."""
    first = serve()
    caller = first.caller()
    caller.push(ROWS)
    first.terminate()
    with slowed(first, place, "--drain-seconds", "1", "--engine", "flat") as (process, log):
        assert b"ready" in said(process)
        caller.write(caller.begin(ROWS + 1, 1, k=3).push.push_id, ROWS + 1)  # a table of its own
        asking = caller.stub.Nearest.future(
            pb.NearestRequest(run="run", generation=1, classes=pb.ClassIds(ids=[3])), timeout=WAIT
        )
        assert b"here" in said(process)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(50) == 0
        assert time.monotonic() - began < 20
    assert asking.code() in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
    assert "Traceback" not in log.read_text()
    assert "ERROR" not in log.read_text()
    caller = serve().caller()
    assert caller.table(min_epoch=1).generation.generation == 2
    assert len(caller.nearest([3]).rows) == 1


def test_callers_are_told_by_name_before_grpc_takes_no_calls(start_service: Start) -> None:
    """Who calls without a pause, and leaves at the first refusal: CANCELLED is what few clients repeat."""
    service = start_service(drain_seconds=DRAIN_SECONDS)
    callers = [Caller(service.server.addresses[0]) for _ in range(8)]
    calling = threading.Barrier(len(callers) + 1)
    with ThreadPoolExecutor(len(callers)) as threads:
        refused = [threads.submit(_refusal_while_calling, caller, calling) for caller in callers]
        calling.wait(WAIT)
        service.stop()
        codes = {each.result(WAIT).code() for each in refused}
    assert codes == {grpc.StatusCode.UNAVAILABLE}


def _refusal_while_calling(caller: Caller, calling: threading.Barrier) -> Any:
    caller.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT)
    calling.wait(WAIT)
    while True:
        try:
            caller.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT)
        except grpc.RpcError as error:
            return error
