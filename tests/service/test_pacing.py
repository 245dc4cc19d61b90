"""Readers of tables give way while rows arrive, and get on all the same."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_client import NeighbourClient
from nearkin_service.operations import pacing
from nearkin_service.operations.pacing import LEAST_BYTES_PER_SECOND, RECENT_SECONDS, SHARE, Pacing
from numpy.typing import NDArray

from tests.service.conftest import Caller, Service, brute_force, random_rows
from tests.service.engines.test_exact import ENGINES

MIB = 1 << 20


class Clock:
    """Time that passes only while somebody sleeps, or when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(pacing, "time", self)
        monkeypatch.setattr(pacing, "asyncio", SimpleNamespace(sleep=self._async_sleep, Lock=asyncio.Lock))

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    async def _async_sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(params=["thread", "event loop"])
def wait(request: pytest.FixtureRequest) -> Callable[[Pacing, int], None]:
    if request.param == "thread":
        return Pacing.wait
    return lambda paced, nbytes: asyncio.run(paced.turn(nbytes))


def test_nobody_waits_where_no_rows_arrive(clock: Clock, wait: Callable[[Pacing, int], None]) -> None:
    paced = Pacing()
    for _ in range(1000):
        wait(paced, 2 * MIB)
    assert clock.now == 1000.0


def test_a_quiet_push_lets_readers_get_on(clock: Clock, wait: Callable[[Pacing, int], None]) -> None:
    paced = Pacing()
    paced.rows_arrived(1)
    for _ in range(int(RECENT_SECONDS * LEAST_BYTES_PER_SECOND / MIB) - 1):
        wait(paced, MIB)
    assert clock.now < 1000.0 + RECENT_SECONDS + 0.1
    clock.sleep(RECENT_SECONDS)
    later = clock.now
    for _ in range(1000):
        wait(paced, 2 * MIB)
    assert clock.now == later, "no rows arrive any more"


def test_tables_get_their_share_of_a_fast_push(clock: Clock) -> None:
    paced, sent, pushed = Pacing(), 0, 0
    paced.rows_arrived(0)
    start = clock.now
    while clock.now < start + 10:
        paced.rows_arrived(20 * MIB)
        pushed += 20 * MIB
        clock.sleep(0.01)
        while paced._may_go(2 * MIB):
            sent += 2 * MIB
    allowed = pushed * SHARE + 10 * LEAST_BYTES_PER_SECOND
    assert 0.5 * allowed < sent <= 1.1 * allowed


@contextmanager
def rows_arriving(caller: Caller, rows: NDArray[np.float32]) -> Iterator[None]:
    """These, again and again, from before it begins until it ends."""
    done, pushed = threading.Event(), threading.Event()

    def push_on() -> None:
        with NeighbourClient(caller.address, run="beside", shared_memory=False) as client:
            epoch = 0
            while not done.is_set():
                client.abort(client.push(rows, epoch=epoch, k=4, commit=False))
                epoch += 1
                pushed.set()

    pusher = threading.Thread(target=push_on)
    pusher.start()
    try:
        assert pushed.wait(30)
        yield
    finally:
        done.set()
        pusher.join()


def test_readers_beside_a_push_all_read_the_same(service: Service, caller: Caller) -> None:
    caller.push(random_rows(1000, 4), k=500)

    def read(_: int) -> bytes:
        with NeighbourClient(caller.address, run="run", shared_memory=False) as client:
            table = client.table(generation=1)
            assert table.scores is not None
            return table.ids.tobytes() + table.scores.tobytes()

    with rows_arriving(caller, random_rows(64, 1 << 15)), ThreadPoolExecutor(12) as readers:
        found = set(readers.map(read, range(24)))
    expected = caller.table()
    assert expected.scores is not None
    assert found == {np.asarray(expected.ids).tobytes() + np.asarray(expected.scores).tobytes()}


def test_who_maps_a_table_waits_too(service: Service, caller: Caller) -> None:
    """Reading what is mapped takes a processor's time as well, and many do so at once."""
    caller.push(random_rows(1000, 4), k=500)
    caller.table(min_epoch=0)
    paced, asked = service.server.core.pacing, pb.ReadTableRequest(run="run", accept_shared_memory=True)
    paced.rows_arrived(0)
    paced._may_go(1 << 40)  # all that tables get
    began = time.monotonic()
    assert next(caller.stub.ReadTable(asked, timeout=30)).header.ids_path
    assert time.monotonic() - began > RECENT_SECONDS / 2


@pytest.mark.parametrize("rows", ["its own", "none since", "others"])
def test_a_build_rests_only_while_other_rows_arrive(rows: str) -> None:
    pacing, never = Pacing(), threading.Event()
    if rows == "its own":
        pacing.rows_arrived(1)
    began = time.monotonic()
    if rows == "others":
        pacing.rows_arrived(1)
    pacing.rest(began, 0.2, never)
    assert (time.monotonic() - began >= 0.2) == (rows == "others")


def test_a_build_that_is_cancelled_does_not_rest() -> None:
    pacing, cancelled = Pacing(), threading.Event()
    began = time.monotonic()
    pacing.rows_arrived(1)
    threading.Timer(0.05, cancelled.set).start()
    pacing.rest(began, 60.0, cancelled)
    assert cancelled.is_set()
    assert time.monotonic() - began < RECENT_SECONDS


@pytest.mark.parametrize("engine", ENGINES)
def test_every_thread_of_a_build_rests_seven_times_as_long_as_it_worked(
    caller: Caller, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = threading.local()
    rests: list[tuple[float, float]] = []

    def rest(_pacing: Pacing, _since: float, seconds: float, _wake: threading.Event) -> None:
        now = time.thread_time()
        if hasattr(mine, "used"):
            rests.append((seconds, now - mine.used))
        mine.used = now

    monkeypatch.setattr(Pacing, "rest", rest)
    caller.push(random_rows(4_000, 256), k=32, engine=engine)
    assert len(rests) > 5
    for seconds, worked in rests:
        assert seconds == pytest.approx(7 * worked, abs=0.02)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_build_beside_rows_without_end_comes_to_its_table(caller: Caller, engine: str) -> None:
    theirs = random_rows(2_100, 32)
    with rows_arriving(caller, random_rows(64, 1 << 12)):
        caller.push(theirs, engine=engine)
    np.testing.assert_array_equal(caller.table().ids, brute_force(theirs, 5))


@pytest.mark.parametrize("what", ["begun", "stored"])
def test_rows_count_as_arriving_from_the_beginning_of_their_push(
    service: Service, caller: Caller, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    told: list[int] = []
    monkeypatch.setattr(Pacing, "rows_arrived", lambda _pacing, nbytes: told.append(nbytes))
    rows = random_rows(10, 8)
    push_id = caller.begin(rows).push.push_id
    if what == "stored":
        caller.write(push_id, rows)
    assert told == [0, rows.nbytes][: 1 if what == "begun" else 2]
