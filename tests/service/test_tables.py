"""Reading tables: which generation, waiting for it, all of it or a part, many at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service import engines
from nearkin_service.config import Limits
from nearkin_service.engines import Parent
from nearkin_service.engines.contract import BuildMonitor, BuildRequest, BuiltTable

from tests.service.conftest import (
    Caller,
    Service,
    Table,
    brute_force,
    eventually,
    random_rows,
    read_table,
    refusal,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


class HeldEngines:
    """The real engines, but every build waits for `go`, and may be told to fail."""

    describe_engines = staticmethod(engines.describe_engines)
    open_searcher = staticmethod(engines.open_searcher)

    def __init__(self) -> None:
        self.go = threading.Event()
        self.error: Exception | None = None
        self.building = threading.Event()

    def build_table(self, rows: Any, request: BuildRequest, monitor: BuildMonitor) -> BuiltTable:
        self.building.set()
        while not self.go.wait(0.01):
            monitor.check()
        if self.error is not None:
            raise self.error
        return engines.build_table(rows, request, monitor)

    def update_table(
        self, rows: Any, request: BuildRequest, _parent: Parent, monitor: BuildMonitor
    ) -> BuiltTable:
        return self.build_table(rows, request, monitor)


@pytest.fixture
def held() -> HeldEngines:
    return HeldEngines()


@pytest.fixture
def held_caller(held: HeldEngines, start_service: Callable[..., Service]) -> Caller:
    return start_service(using=held).caller()


def test_scores_are_cosines_and_only_sent_when_asked_for(caller: Caller) -> None:
    rows = random_rows(40, 6)
    caller.push(rows, k=4)
    table = caller.table()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = np.take_along_axis(unit @ unit.T, table.ids.astype(np.int64), axis=1)
    assert table.scores is not None
    np.testing.assert_allclose(table.scores, expected, atol=1e-6)
    assert caller.table(with_scores=False).scores is None


def test_row_ranges_are_parts_of_the_whole(caller: Caller) -> None:
    """Wide enough for several blocks, cut across their edges."""
    caller.push(random_rows(3000, 8), k=700)
    whole = caller.table()
    assert whole.scores is not None
    for start, count in [(0, 1), (748, 3), (100, 2000), (2999, 1), (1500, 0)]:
        part = caller.table(row_start=start, row_count=count)
        stop = start + count if count else 3000
        np.testing.assert_array_equal(part.ids, whole.ids[start:stop])
        np.testing.assert_array_equal(part.scores, whole.scores[start:stop])


@pytest.mark.parametrize(("start", "count"), [(40, 1), (-1, 3), (39, 2), (0, 41), (0, -1), (2**62, 2**62)])
def test_row_ranges_that_do_not_fit(caller: Caller, start: int, count: int) -> None:
    caller.push(random_rows(40, 6))
    assert refusal(lambda: caller.table(row_start=start, row_count=count)).code() is INVALID


def test_generations_by_number_by_epoch_and_newest(caller: Caller) -> None:
    data = [random_rows(30, 4, seed=seed) for seed in range(3)]
    for epoch, rows in zip((2, 5, 7), data, strict=True):
        caller.push(rows, epoch)
    for number, rows in enumerate(data, 1):
        np.testing.assert_array_equal(caller.table(generation=number).ids, brute_force(rows, 5))
    assert caller.table().generation.epoch == 7
    assert caller.table(min_epoch=3).generation.epoch == 7
    assert refusal(lambda: caller.table(generation=4)).code() is NOT_FOUND
    assert refusal(lambda: caller.table(run="other")).code() is NOT_FOUND
    assert refusal(lambda: caller.table(generation=-1)).code() is INVALID
    assert refusal(lambda: caller.table(min_epoch=-1)).code() is INVALID
    assert refusal(lambda: caller.table(run="no/path")).code() is INVALID


def test_a_run_without_a_generation_has_no_newest(caller: Caller) -> None:
    caller.begin(random_rows(10, 4))
    assert refusal(caller.table).code() is NOT_FOUND


def test_waiting_ends_with_the_publication(caller: Caller) -> None:
    """Waiting begins before the run exists, on many readers; all get the same bytes."""
    rows = random_rows(50, 4)
    with ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(caller.table, min_epoch=0) for _ in range(16)]
        time.sleep(0.2)
        caller.push(rows)
        tables: list[Table] = [each.result() for each in waiting]
    for table in tables:
        np.testing.assert_array_equal(table.ids, brute_force(rows, 5))


def test_waiting_ends_with_the_deadline_and_says_why(caller: Caller) -> None:
    caller.begin(random_rows(10, 4))
    request = pb.ReadTableRequest(run="run", min_epoch=0)
    began = time.monotonic()
    error = refusal(lambda: list(caller.stub.ReadTable(request, timeout=0.4)))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "10 rows are missing" in error.details()
    assert time.monotonic() - began < 2
    request = pb.ReadTableRequest(run="never", min_epoch=0)
    error = refusal(lambda: list(caller.stub.ReadTable(request, timeout=0.3)))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("how", ["failed", "aborted", "internal", "timeout"])
def test_waiting_ends_when_the_push_comes_to_nothing(
    held: HeldEngines, held_caller: Caller, how: str
) -> None:
    caller, rows = held_caller, random_rows(20, 4)
    begun = caller.begin(rows, build_timeout={"nanos": 10**8} if how == "timeout" else None)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(refusal, lambda: caller.table(min_epoch=0))
        caller.write(begun.push.push_id, rows)
        assert held.building.wait(10)
        if how == "aborted":
            caller.stub.AbortPush(pb.AbortPushRequest(push_id=begun.push.push_id))
        elif how != "timeout":
            held.error = ValueError("row 3 is odd") if how == "failed" else RuntimeError("a bug")
            held.go.set()
        error = waiting.result(20)
    assert error.code() is PRECONDITION
    expected = {
        "failed": "row 3 is odd",
        "aborted": "aborted",
        "internal": "a bug",
        "timeout": "build_timeout",
    }
    assert expected[how] in error.details()
    held.error = None
    held.go.set()
    caller.push(rows, k=3)
    assert caller.table().generation.generation == 1


def test_readers_of_the_previous_generation_are_not_held_up_by_a_build(
    held: HeldEngines, held_caller: Caller
) -> None:
    caller, rows = held_caller, random_rows(200, 8)
    held.go.set()
    caller.push(rows)
    held.go.clear()
    held.building.clear()
    begun = caller.begin(rows[::-1].copy(), epoch=1)
    caller.write(begun.push.push_id, rows[::-1].copy())
    assert held.building.wait(10)
    for _ in range(20):
        assert caller.table().generation.generation == 1
        assert caller.nearest([3]).generation == 1
    held.go.set()
    assert caller.table(min_epoch=1).generation.generation == 2


def test_runs_take_turns_at_building(held: HeldEngines, held_caller: Caller) -> None:
    """A run that has queued many epochs does not make another run wait for all of them."""
    caller, rows = held_caller, random_rows(20, 4)
    for run, epochs in (("busy", 4), ("other", 1)):
        for epoch in range(epochs):
            caller.write(caller.begin(rows, epoch, run=run).push.push_id, rows)
    held.go.set()
    caller.table(run="busy", min_epoch=3)
    published = [caller.generation(run="other").published.ToNanoseconds()]
    published += [g.published.ToNanoseconds() for g in caller.generations("busy")]
    assert sorted(published).index(published[0]) <= 2


def test_a_slow_reader_holds_nobody_up_and_survives_removal(caller: Caller) -> None:
    rows = random_rows(3000, 4)
    caller.push(rows, k=1500)
    slow = caller.stub.ReadTable(pb.ReadTableRequest(run="run", with_scores=True))
    header = next(slow)
    caller.push(rows[::-1].copy(), epoch=1, k=1500)
    whole = caller.table(generation=1)
    caller.stub.DeleteGeneration(pb.DeleteGenerationRequest(run="run", generation=1))
    table = read_table(iter([header, *slow]))
    np.testing.assert_array_equal(table.ids, whole.ids)
    np.testing.assert_array_equal(table.scores, whole.scores)


def test_waiting_readers_are_limited(start_service: Callable[..., Service]) -> None:
    service = start_service(limits=Limits(max_waiting_readers=1))
    caller = service.caller()
    request = pb.ReadTableRequest(run="run", min_epoch=0)
    first = caller.stub.ReadTable(request)
    waiting = service.server.core.metrics.waiting_readers._value.get
    eventually(waiting, lambda n: n == 1)
    error = refusal(lambda: list(caller.stub.ReadTable(request)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "max_waiting_readers" in error.details()
    first.cancel()
    eventually(waiting, lambda n: n == 0)


def test_deleting_the_run_ends_the_wait(caller: Caller) -> None:
    caller.begin(random_rows(10, 4))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(refusal, lambda: caller.table(min_epoch=0))
        time.sleep(0.2)
        caller.stub.DeleteRun(pb.DeleteRunRequest(run="run"))
        assert waiting.result(10).code() is NOT_FOUND
