"""Connections are cut and services restarted, and the caller notices nothing but time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from crc32c import crc32c
from nearkin.v1 import bulk
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_client import DataLoss, NeighbourClient, NotReadyInTime, Patience, RunSnapshot, Unavailable
from nearkin_client.channel import Endpoint
from nearkin_client.local import LocalService
from nearkin_client.patience import Stalled
from nearkin_client.push import Sender
from nearkin_client.testing import neighbour_service
from nearkin_client.wire import Wire

from tests.client.fakes import fake_service
from tests.client.oracle import assert_is_table, similarities
from tests.client.proxy import cutting_proxy

generator = np.random.default_rng(11)


@pytest.fixture(scope="module")
def service() -> Iterator[LocalService]:
    """A service that tests here stop, kill and start again."""
    with neighbour_service() as started:
        yield started


def test_a_push_cut_ten_times_moves_little_more_than_its_bytes(service: LocalService) -> None:
    rows = generator.standard_normal((256, 1 << 17)).astype(np.float32)
    with cutting_proxy(service.address, cut_after=rows.nbytes // 12, cuts=10) as proxy:
        with NeighbourClient(proxy.address, run="cut") as client:
            client.push(rows, epoch=0, k=4, timeout=60)
        assert proxy.cuts_left == 0
        assert proxy.bytes_up < 1.2 * rows.nbytes
    with NeighbourClient(service.address, run="cut") as client:
        table = client.table(epoch=0, timeout=60)
    assert table.scores is not None
    assert_is_table(table.ids, table.scores, similarities(rows))


def test_a_connection_that_moves_nothing_is_left(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nearkin_client.wire.STALL_SECONDS", 0.5)
    rows = generator.standard_normal((1024, 1 << 14)).astype(np.float32)
    with cutting_proxy(service.address, cut_after=rows.nbytes // 3, cuts=2, deaf=True) as proxy:
        with NeighbourClient(proxy.address, run="deaf") as client:
            push = client.push(rows, epoch=0, k=4, timeout=60)
        assert push.rows_stored == 1024
        assert proxy.cuts_left == 0


def test_ctrl_c_ends_what_grpc_sends_on_its_own_thread() -> None:
    """It would go on with an array that is the caller's again, as long as a notebook keeps the traceback."""
    ended = threading.Event()

    def write_rows(messages: Any, _: grpc.ServicerContext) -> bytes:
        try:
            list(messages)
        finally:
            ended.set()
        return b""

    def endless() -> Iterator[bulk.WriteRows]:
        while True:
            yield bulk.WriteRows("push", 0, memoryview(bytes(8)))
            time.sleep(0.01)

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with fake_service(WriteRows=write_rows) as address:
            wire = Wire(Endpoint.resolve(address, None), Patience())
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            with pytest.raises(KeyboardInterrupt) as kept:
                wire.write_rows(endless(), 60)
            assert ended.wait(5)
            del kept
            wire.close()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_what_fails_in_a_stream_that_broke_is_not_held_against_the_next(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC's thread may still read the messages of the one before."""
    streams: list[Any] = []
    write_rows = Wire.write_rows

    def breaking(wire: Wire, messages: Any, seconds: float) -> pb.WriteRowsResponse:
        streams.append(messages)
        if len(streams) > 2:
            return write_rows(wire, messages, seconds)
        next(messages)
        if len(streams) == 2:
            with pytest.raises(OSError, match="late"):
                streams[0].throw(OSError("late"))
        raise Stalled(1.0)

    monkeypatch.setattr(Wire, "write_rows", breaking)
    rows = generator.standard_normal((64, 32)).astype(np.float32)
    with NeighbourClient(service.address, run="late", shared_memory=False) as client:
        assert client.push(rows, epoch=0, k=4, timeout=60).rows_stored == 64
    assert len(streams) == 3


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_a_push_goes_on_after_the_service_came_back(service: LocalService, how: str) -> None:
    rows = generator.standard_normal((64, 1 << 16)).astype(np.float32)
    with NeighbourClient(service.address, run=f"back-after-{how}") as client:
        begun = client.push(rows[:1], epoch=0, num_classes=64, k=4)
        with ThreadPoolExecutor(1) as rank:
            pushing = rank.submit(client.push, rows, epoch=0, k=4, timeout=60)
            if how == "kill":
                service.kill()
                service.start()
            else:
                service.restart()
            push = pushing.result()
        assert push.push_id == begun.push_id
        table = client.table(epoch=0, timeout=60)
        assert table.scores is not None
        assert_is_table(table.ids, table.scores, similarities(rows))


def test_waiting_for_a_table_survives_a_restart(service: LocalService) -> None:
    rows = generator.standard_normal((20, 8)).astype(np.float32)
    with NeighbourClient(service.address, run="waiting") as client:
        client.push(rows[:10], epoch=0, num_classes=20, k=4)
        with ThreadPoolExecutor(1) as reader:
            waiting = reader.submit(client.table, epoch=0, timeout=60)
            time.sleep(0.2)
            service.restart()
            client.push(rows[10:], epoch=0, row_start=10, num_classes=20, k=4)
            table = waiting.result()
    assert table.scores is not None
    assert_is_table(table.ids, table.scores, similarities(rows))


def test_published_tables_are_the_same_after_a_restart(service: LocalService) -> None:
    rows = generator.standard_normal((20, 8)).astype(np.float32)
    with NeighbourClient(service.address, run="lasting") as client:
        client.push(rows, epoch=0, k=4)
        before = client.table(epoch=0, timeout=60)
        service.kill()
        service.start()
        after = client.table(generation=before.generation)
        assert before.ids.tobytes() == after.ids.tobytes()
        assert client.nearest(classes=[3]).ids.tolist() == [before.ids[3].tolist()]


def test_watching_goes_on_after_a_restart(service: LocalService) -> None:
    rows = generator.standard_normal((20, 8)).astype(np.float32)
    with NeighbourClient(service.address, run="watched") as client:
        client.push(rows, epoch=0, k=4)
        client.table(epoch=0, timeout=60)
        events = client.watch(timeout=60)
        assert isinstance(next(events), RunSnapshot)
        service.restart()
        again = next(each for each in events if isinstance(each, RunSnapshot))
        assert again.run.newest is not None
        assert again.run.newest.epoch == 0


@pytest.mark.parametrize("what", ["table", "watch"])
def test_restarts_far_apart_are_not_one_outage(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for an epoch, or for a run, hears nothing in between, and is there all the same."""
    monkeypatch.setattr("nearkin_client.patience.Persistence.LONGEST_CONNECT", 0.2)
    ids = np.array([[1], [0]], np.int32)
    restarts = iter(range(4))

    def waiting(_: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        if next(restarts, None) is not None:
            time.sleep(0.4)
            context.abort(grpc.StatusCode.UNAVAILABLE, "stopping")
        if what == "watch":
            yield pb.RunEvent(snapshot=pb.Run(run="r")).SerializeToString()
        else:
            yield from _answer(ids, damaged=False)

    with (
        fake_service(ReadTable=waiting, WatchRun=waiting) as address,
        NeighbourClient(address, run="r", patience=Patience(outage=0.7)) as client,
    ):
        if what == "watch":
            assert isinstance(next(client.watch(timeout=30)), RunSnapshot)
        else:
            np.testing.assert_array_equal(client.table(epoch=0, scores=False, timeout=30).ids, ids)


def test_watching_ends_when_its_time_is_over_though_the_service_is_away() -> None:
    """Who could never be reached at all is said to be unreachable."""
    present = threading.Event()
    present.set()

    def leaving(_: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        if present.is_set():
            present.clear()
            yield pb.RunEvent(snapshot=pb.Run(run="r")).SerializeToString()
        context.abort(grpc.StatusCode.UNAVAILABLE, "stopping")

    with fake_service(WatchRun=leaving) as address, NeighbourClient(address, run="r") as client:
        began = time.monotonic()
        assert [type(each) for each in client.watch(timeout=1.0)] == [RunSnapshot]
        assert 0.9 < time.monotonic() - began < 10
        with pytest.raises(Unavailable, match="cannot be reached"):
            list(client.watch(timeout=1.0))


def test_a_deadline_holds_while_nobody_answers() -> None:
    def never(_: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        threading.Event().wait(2)
        yield b""

    with fake_service(ReadTable=never) as address, NeighbourClient(address, run="r") as client:
        began = time.monotonic()
        with pytest.raises(NotReadyInTime, match="epoch 1"):
            client.table(epoch=1, timeout=0.3)
        assert time.monotonic() - began < 1.5


def _answer(ids: np.ndarray[tuple[int, ...], np.dtype[np.int32]], damaged: bool) -> Iterator[bytes]:
    payload = ids.data.cast("B")
    crc = crc32c(payload)
    generation = pb.Generation(run="r", generation=1, num_classes=len(ids), k=ids.shape[1], ids_crc32c=crc)
    yield bulk.encode_table_message(pb.TableHeader(generation=generation, row_count=len(ids), k=ids.shape[1]))
    block = bulk.TableBlock(pb.TABLE_COLUMN_IDS, 0, len(ids), crc, payload)
    message = bytearray(bulk.encode_table_message(block))
    message[-1] ^= damaged
    yield bytes(message)


@pytest.mark.parametrize("damaged_answers", [1, 99])
def test_a_damaged_table_is_read_again_and_never_returned(damaged_answers: int) -> None:
    ids = np.arange(12, dtype=np.int32).reshape(4, 3)
    answers = iter(range(100))

    def read(_: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        return _answer(ids, damaged=next(answers) < damaged_answers)

    with fake_service(ReadTable=read) as address, NeighbourClient(address, run="r") as client:
        if damaged_answers == 1:
            np.testing.assert_array_equal(client.table(scores=False).ids, ids)
        else:
            with pytest.raises(DataLoss, match="crc32c"):
                client.table(scores=False)


def test_a_table_that_ends_early_is_not_returned() -> None:
    ids = np.arange(12, dtype=np.int32).reshape(4, 3)

    def read(_: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        return iter(list(_answer(ids, damaged=False))[:1])

    with (
        fake_service(ReadTable=read) as address,
        NeighbourClient(address, run="r") as client,
        pytest.raises(DataLoss, match="last row"),
    ):
        client.table(scores=False)


def _in_a_fork(act: Callable[[], object]) -> str:
    """What comes of it there."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.alarm(20)
            os.write(writing, repr(act()).encode())
        except BaseException as error:
            os.write(writing, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        answer = said.read()
    os.waitpid(child, 0)
    return answer


def test_a_forked_child_is_told_to_make_a_client_of_its_own(service: LocalService) -> None:
    """Nobody serves its parent's connections there: it would wait for longer than any deadline."""
    rows = generator.standard_normal((64, 1 << 14)).astype(np.float32)
    with NeighbourClient(service.address, run="forked", shared_memory=False) as client:
        client.push(rows, epoch=0, k=4)
        for act in (
            lambda: client.table(epoch=0, timeout=5),
            lambda: client.push(rows, epoch=1, k=4, timeout=5),
            lambda: client.nearest(classes=[1], timeout=5),
            lambda: list(client.watch(timeout=5)),
        ):
            assert "make one in each process, after forking" in _in_a_fork(act)


def test_closing_in_a_forked_child_leaves_its_parents_calls_alone(service: LocalService) -> None:
    rows = generator.standard_normal((64, 1 << 14)).astype(np.float32)
    with NeighbourClient(service.address, run="both", shared_memory=False) as client:
        closed: list[str] = []
        sent = Sender._sent

        def closing(sender: Sender, message: bulk.WriteRows, crc: int) -> None:
            if not closed:
                closed.append(_in_a_fork(client.close))
            sent(sender, message, crc)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sender, "_sent", closing)
            patch.setattr(Sender, "_arrived", None)  # nothing breaks
            assert client.push(rows, epoch=0, k=4, timeout=60).rows_stored == 64
        assert closed == ["None"]
