"""A service on this host that was dialled by TCP: rows and tables go as they do over its unix socket."""

from __future__ import annotations

import itertools
import logging
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_client import FailedPrecondition, NeighbourClient, NeighbourTable, doors
from nearkin_client.local import LocalService
from nearkin_client.testing import neighbour_service
from nearkin_client.wire import Wire

from tests.client.oracle import assert_is_table, similarities
from tests.client.proxy import cutting_proxy
from tests.client.restarts import before_the_tenth_piece, service_with_port, start_again
from tests.ports import free_port

LARGE = np.random.default_rng(5).standard_normal((600, 1024)).astype(np.float32)
SMALL = LARGE[:40, :8].copy()


@pytest.fixture(scope="module")
def service() -> Iterator[LocalService]:
    with neighbour_service(listen=(f"127.0.0.1:{free_port()}", f"[::1]:{free_port()}")) as started:
        yield started


@pytest.fixture
def tcp(service: LocalService) -> str:
    return service._listen[1]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="nearkin")
    return caplog


def is_mapped(table: NeighbourTable) -> bool:
    below: Any = table.ids
    while isinstance(below, np.ndarray):
        below = below.base
    return isinstance(below.obj if isinstance(below, memoryview) else below, mmap.mmap)


def assert_right(table: NeighbourTable, rows: np.ndarray[Any, Any]) -> None:
    assert table.scores is not None
    assert_is_table(table.ids, table.scores, similarities(rows))


@pytest.mark.parametrize("place", [1, 2], ids=["127.0.0.1", "::1"])
@pytest.mark.parametrize("rows", [SMALL, LARGE], ids=["few bytes", "many"])
def test_rows_are_written_in_place_and_tables_mapped(
    service: LocalService, log: pytest.LogCaptureFixture, place: int, rows: np.ndarray[Any, Any]
) -> None:
    run = f"in-place-{place}-{len(rows)}"
    with NeighbourClient(service._listen[place], run=run) as client:
        client.push(rows, epoch=0, k=len(rows) - 1)
        table = client.table(epoch=0, timeout=60)
        part = client.table(epoch=0, rows=(3, 30))
    assert "rows go through shared memory" in log.text
    assert is_mapped(table)
    np.testing.assert_array_equal(part.ids, table.ids[3:30])
    assert_right(table, rows)


def test_who_wants_no_shared_memory_is_led_to_a_unix_socket(tcp: str, log: pytest.LogCaptureFixture) -> None:
    with NeighbourClient(tcp, run="socket", shared_memory=False) as client:
        client.push(LARGE, epoch=0, k=300)
        table = client.table(epoch=0, timeout=60)
    assert "the connection is the bulk lane, @nearkin-" in log.text
    assert not is_mapped(table)
    assert_right(table, LARGE)


@pytest.mark.usefixtures("from_another_host")
def test_from_another_host_everything_crosses_the_connection(tcp: str, log: pytest.LogCaptureFixture) -> None:
    with NeighbourClient(tcp, run="far") as client:
        client.push(LARGE, epoch=0, k=300)
        table = client.table(epoch=0, timeout=60)
    assert "rows go through the connection" in log.text
    assert "the connection is the bulk lane, port" in log.text
    assert not is_mapped(table)
    assert_right(table, LARGE)
    with NeighbourClient(tcp, run="far", shared_memory=True) as client:
        with pytest.raises(FailedPrecondition, match=f"shared_memory=True: {tcp} .* another host"):
            client.push(LARGE, epoch=1, k=300)
        assert client.run_info().pushes == ()
        with pytest.raises(FailedPrecondition, match=f"shared_memory=True: {tcp} .* another host"):
            client.table(epoch=0)


def test_behind_a_proxy_everything_goes_through_it(
    service: LocalService, log: pytest.LogCaptureFixture
) -> None:
    """The near end of a tunnel is on this host, whatever is at its other end."""
    with cutting_proxy(service.address, 1 << 40, 0) as proxy:
        with NeighbourClient(proxy.address, run="tunnel") as client:
            client.push(LARGE, epoch=0, k=300)
            table = client.table(epoch=0, timeout=60)
        assert proxy.bytes_up > LARGE.nbytes
    assert "rows go through the connection" in log.text
    assert not is_mapped(table)
    assert_right(table, LARGE)


@pytest.mark.parametrize("place", [0, 1], ids=["unix", "tcp"])
@pytest.mark.parametrize("rows", [SMALL, LARGE], ids=["few bytes", "many"])
def test_behind_a_proxy_shared_memory_is_asked_for_once(
    service: LocalService, monkeypatch: pytest.MonkeyPatch, rows: np.ndarray[Any, Any], place: int
) -> None:
    asked, read = [], Wire.read_table

    def counted(wire: Wire, request: pb.ReadTableRequest, seconds: float) -> Any:
        asked.append(request.accept_shared_memory)
        return read(wire, request, seconds)

    monkeypatch.setattr(Wire, "read_table", counted)
    run, address = f"asking-{place}-{len(rows)}", service._listen[place]
    with NeighbourClient(address, run=run) as client:
        client.push(rows, epoch=0, k=len(rows) - 1)
        client.table(epoch=0, timeout=60)
    assert asked == [True]
    asked.clear()
    with (
        cutting_proxy(address, 1 << 40, 0) as proxy,
        NeighbourClient(proxy.address, run=run) as client,
    ):
        for _ in range(3):
            assert_right(client.table(epoch=0, timeout=60), rows)
    assert asked.count(True) == 1


def test_who_is_elsewhere_by_then_goes_on_through_the_connection(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """The address leads to another host after a restart: what it names there is not written to here."""
    rows = np.random.default_rng(6).standard_normal((64, 1 << 18)).astype(np.float32)

    def move() -> None:
        monkeypatch.setattr("nearkin_client.doors._why_unproven", lambda _: "another host")
        start_again(started)

    before_the_tenth_piece(move, monkeypatch)
    with (
        service_with_port() as started,
        NeighbourClient(started._listen[1], run="moved") as client,
    ):
        client.push(rows, epoch=0, k=4, timeout=60)
        table = client.table(epoch=0, timeout=60)
    assert "what is left goes through the connection" in log.text
    assert_right(table, rows)


def test_a_start_before_the_service_has_shown_that_it_is_here_is_no_other_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where shared memory is a must, it is asked again before that is given up."""
    times, look = itertools.count(), doors._why_unproven

    def starting(offer: pb.BulkLane) -> str:
        if not next(times) % 2:
            start_again(started)
        return look(offer)

    with (
        service_with_port() as started,
        NeighbourClient(started._listen[1], run="again", shared_memory=True) as client,
        monkeypatch.context() as patch,
    ):
        patch.setattr("nearkin_client.doors._why_unproven", starting)
        client.push(SMALL, epoch=0, k=5, timeout=60)
        table = client.table(epoch=0, timeout=60)
    assert next(times) == 4
    assert is_mapped(table)
    assert_right(table, SMALL)
