"""Descriptors, memory, threads and permissions that run out: calls say which, and nothing is lost."""

from __future__ import annotations

import errno
import logging
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_client import NeighbourClient
from nearkin_service import engines
from nearkin_service.engines import loading, ways
from nearkin_service.operations.core import threads

from tests.service.conftest import (
    Caller,
    Service,
    Serving,
    brute_force,
    code_of,
    errors_of,
    eventually,
    random_rows,
    refusal,
)

Start = Callable[..., Service]
ROWS = random_rows(30, 8)


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "somewhere")


@contextmanager
def no_more_descriptors(process: int) -> Iterator[None]:
    before = resource.prlimit(process, resource.RLIMIT_NOFILE)
    resource.prlimit(process, resource.RLIMIT_NOFILE, (1, before[1]))
    yield
    resource.prlimit(process, resource.RLIMIT_NOFILE, before)


def test_without_descriptors_calls_end_in_a_limit_and_come_back(serve: Callable[..., Serving]) -> None:
    serving = serve()
    caller = serving.caller()
    caller.push(ROWS)
    calls: dict[str, Callable[[], Any]] = {
        "ReadTable": caller.table,
        "Nearest": lambda: caller.nearest([1], k=3),
        "BeginPush": lambda: caller.begin(ROWS, 1),
        "CompareGenerations": lambda: caller.stub.CompareGenerations(
            pb.CompareGenerationsRequest(run="run", base_generation=1, generation=1), timeout=30
        ),
    }
    with no_more_descriptors(serving.process.pid):
        caller.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=30)
        for name, call in calls.items():
            error = refusal(call)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, (name, error.details())
            assert "open_files" in str(error.details())
    for call in calls.values():
        call()
    assert serving.terminate() == 0
    assert "Traceback" not in serving.log.read_text()


def test_a_directory_that_may_not_be_used_is_unavailable(service: Service, caplog: Any) -> None:
    caller = service.caller()
    caller.push(ROWS)
    with mock.patch.object(service.server.core.directory, "map_column", side_effect=os_error(errno.EACCES)):
        error = refusal(caller.table)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "Permission denied" in str(error.details())
    np.testing.assert_array_equal(caller.table().ids, brute_force(ROWS, 5))
    assert not errors_of(caplog, "nearkin")


def test_a_generation_that_could_not_be_deleted_is_served_on(service: Service) -> None:
    caller = service.caller()
    caller.push(ROWS)
    delete = pb.DeleteGenerationRequest(run="run", generation=1)
    trouble = mock.patch.object(
        service.server.core.directory, "delete_generation", side_effect=os_error(errno.EACCES)
    )
    with trouble:
        refusal(lambda: caller.stub.DeleteGeneration(delete, timeout=30))
    np.testing.assert_array_equal(caller.table(generation=1).ids, brute_force(ROWS, 5))
    assert caller.nearest([1], k=3).generation == 1
    caller.stub.DeleteGeneration(delete, timeout=30)
    assert refusal(lambda: caller.table(generation=1)).code() is grpc.StatusCode.NOT_FOUND


def test_retention_that_fails_at_one_generation_goes_on_with_the_others(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caller = service.caller()
    for epoch in range(3):
        caller.push(random_rows(30, 8, seed=epoch), epoch, retention=pb.Retention(keep_embeddings=9))
    directory = service.server.core.directory
    clear = directory.delete_generation

    def fails_at_the_first(generation: Any) -> None:
        if generation.number == 1:
            raise os_error(errno.EACCES)
        clear(generation)

    with mock.patch.object(directory, "delete_generation", fails_at_the_first):
        caller.push(ROWS, 3, retention=pb.Retention(keep_tables=1))
        service.stop()
    assert {path.name for path in (tmp_path / "data/runs/run/generations").iterdir()} == {"1", "4"}
    assert not errors_of(caplog, "nearkin")


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE, errno.EACCES])
def test_a_start_that_cannot_read_takes_nothing_for_damaged(
    start_service: Start, tmp_path: Path, number: int
) -> None:
    service = start_service()
    service.caller().push(ROWS)
    push_id = service.caller().begin(ROWS, 1).push.push_id
    service.stop()
    for place in ("generation_files._verify_column", "push_files.recover"):
        name = f"nearkin_service.store.{place}"
        with mock.patch(name, side_effect=os_error(number)), pytest.raises(OSError, match="somewhere"):
            start_service()
        assert not list((tmp_path / "data/quarantine").iterdir())
    caller = start_service().caller()
    np.testing.assert_array_equal(caller.table(generation=1).ids, brute_force(ROWS, 5))
    assert caller.state(push_id).state == pb.PUSH_STATE_OPEN


@pytest.mark.parametrize("error", [MemoryError(), os_error(errno.ENOMEM), RuntimeError("std::bad_alloc")])
def test_a_build_without_memory_says_so(
    start_service: Start, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    caller = start_service().caller()
    with mock.patch.object(engines, "build_table", side_effect=error):
        push_id = caller.begin(ROWS).push.push_id
        caller.write(push_id, ROWS)
        assert caller.ended(push_id).error.startswith("memory: ")
    caller.push(ROWS)
    assert not errors_of(caplog, "nearkin")


@pytest.mark.parametrize("which", ["nearkin-lane-caller", "Thread-"])
def test_without_threads_the_bulk_lane_goes_on_later(
    service: Service, caplog: pytest.LogCaptureFixture, which: str
) -> None:
    """The second is the watch over who has yet to show a ticket."""
    rows, start = random_rows(4000, 128), threading.Thread.start
    caplog.set_level(logging.INFO)

    def fails(thread: threading.Thread) -> None:
        if thread.name.startswith(which) and (which != "Thread-" or isinstance(thread, threading.Timer)):
            raise RuntimeError("can't start new thread")
        start(thread)

    with NeighbourClient(service.server.addresses[0], run="run", shared_memory=False) as client:
        with mock.patch.object(threading.Thread, "start", fails):
            client.push(rows, epoch=0, k=3)
        caplog.clear()
        client.push(rows + 1, epoch=1, k=3)
        assert "the connection is the bulk lane" in caplog.text
        client.table(epoch=1, timeout=30)
    assert not errors_of(caplog, "nearkin")
    assert not service.server._lane._connections


def test_a_call_without_threads_ends_in_a_limit(service: Service, caplog: Any) -> None:
    caller: Caller = service.caller()
    caller.push(ROWS)
    none = RuntimeError("can't start new thread")
    with mock.patch.object(service.server.core.directory, "map_column", side_effect=none):
        error: Any = refusal(caller.table)
    assert code_of(error) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "threads" in error.details()
    assert not errors_of(caplog, "nearkin")


def test_a_start_without_enough_threads_ends_and_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits for those that never came would keep the process from ending."""
    start = threading.Thread.start

    def starting(thread: threading.Thread) -> None:
        if thread.name == "few_2":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starting)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        threads(4, "few")
    eventually(lambda: [each for each in threading.enumerate() if "few" in each.name], lambda left: not left)


def test_calls_need_no_threads_that_are_not_there_yet(service: Service) -> None:
    """A pool that lacks one refuses the call, and does it later all the same."""
    start = threading.Thread.start

    def fails(thread: threading.Thread) -> None:
        if thread.name.startswith("nearkin-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    caller = service.caller()
    push_id = caller.begin(ROWS, engine="flat", commit_when_complete=False).push.push_id
    caller.write(push_id, ROWS)
    with mock.patch.object(threading.Thread, "start", fails):
        caller.stub.CommitPush(pb.CommitPushRequest(push_id=push_id), timeout=30)
        caller.table(min_epoch=0)
        caller.nearest([1], k=3)
        caller.begin(ROWS, 1)


def test_loops_of_mixed_that_could_not_be_loaded_are_loaded_later() -> None:
    """Who waits for them is let go, or a build would wait for ever."""
    job = ways.Job(300, 8, 5)
    need = loading._need(job)
    with (
        mock.patch.dict(loading._loaded, {need: threading.Event()}),
        mock.patch.object(loading, "_loading", set[str]()),
    ):
        with mock.patch.object(loading, "_build_all", side_effect=os_error(errno.EMFILE)):
            waiting = threading.Thread(target=loading.wait, args=(job,), daemon=True)
            waiting.start()
            waiting.join(10)
            assert not waiting.is_alive()
        loading.wait(job)
        assert loading.ready(job)


def test_a_build_that_finds_no_descriptor_for_the_loops_is_not_the_last_to_try(caller: Caller) -> None:
    rows = random_rows(3000, 64)
    with (
        mock.patch.object(loading, "_WORTH_WAITING", 0),
        mock.patch.object(loading, "_loaded", {"at once": threading.Event(), "scan": threading.Event()}),
        mock.patch.object(loading, "_failed", set[str]()),
    ):
        with mock.patch("nearkin_service.engines.mixed.cpu.build_mixed", side_effect=os_error(errno.EMFILE)):
            push_id = caller.begin(rows, engine="auto").push.push_id
            caller.write(push_id, rows)
            assert "open_files" in caller.ended(push_id).error
        caller.push(rows, 1)
    assert caller.generation().engine == "mixed"


def test_loops_that_are_broken_in_this_process_fail_one_build_and_no_other(caller: Caller) -> None:
    """As after an import for which memory ran out in its middle: what is left of it stays."""
    rows = random_rows(3000, 64)
    broken = mock.patch("nearkin_service.engines.mixed.cpu.build_mixed", side_effect=AttributeError("core"))
    with (
        mock.patch.object(loading, "_WORTH_WAITING", 0),
        mock.patch.object(loading, "_loaded", {"at once": threading.Event(), "scan": threading.Event()}),
        mock.patch.object(loading, "_failed", set[str]()),
        broken,
    ):
        push_id = caller.begin(rows, engine="auto").push.push_id
        caller.write(push_id, rows)
        assert "core" in caller.ended(push_id).error
        caller.push(rows, 1)
    assert caller.generation().engine == "flat"
