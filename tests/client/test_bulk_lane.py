"""Rows and tables over the bulk lane: by itself where the service was dialled, and never where it was not."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nearkin.v1 import bulk, frames
from nearkin_client import AlreadyExists, Cancelled, InvalidArgument, NeighbourClient, NeighbourTable, lane
from nearkin_client.arrays import Rows
from nearkin_client.lane import Lane
from nearkin_client.local import LocalService
from nearkin_client.testing import neighbour_service

from tests.client.proxy import cutting_proxy
from tests.client.restarts import service_with_port

N, WIDTH = 96, 1 << 14
ROWS = np.random.default_rng(5).standard_normal((N, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def service() -> Iterator[LocalService]:
    with service_with_port() as started:
        yield started


@pytest.fixture(params=["unix", "tcp", "tcp on this host"])
def address(request: pytest.FixtureRequest, service: LocalService) -> str:
    if request.param == "tcp":
        request.getfixturevalue("from_another_host")
    return service.address if request.param == "unix" else service._listen[1]


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    return "".join(c if c.isalnum() else "-" for c in request.node.name.lower())[-64:].lstrip("-")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="nearkin")
    return caplog


def connected(address: str, run: str) -> NeighbourClient:
    return NeighbourClient(address, run=run, shared_memory=False)


def assert_pushed(client: NeighbourClient, epoch: int = 0) -> None:
    """That the rows are there: the same again are taken, others are not."""
    client.push(ROWS, epoch=epoch, k=4, commit=False)
    for row in (0, N // 2, N - 1):
        with pytest.raises(AlreadyExists):
            client.push(-ROWS[row : row + 1], epoch=epoch, row_start=row, num_classes=N, k=4, commit=False)


def after(count: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Does something when so many messages of rows went over lanes; the list grows by one for each."""
    sent: list[int] = []
    send = lane.send_rows

    def counting(
        connection: socket.socket, message: bulk.WriteRows, rows: Rows, way: Callable[[memoryview], None]
    ) -> int:
        crc = send(connection, message, rows, way)
        sent.append(message.payload.nbytes)
        if len(sent) == count:
            act()
        return crc

    monkeypatch.setattr(lane, "send_rows", counting)
    return sent


def test_rows_take_the_lane_and_the_log_says_so(
    address: str, run: str, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = after(0, lambda: None, monkeypatch)
    with connected(address, run) as client:
        client.push(ROWS, epoch=0, k=4, commit=False)
        assert sum(sent) == ROWS.nbytes
        assert "the connection is the bulk lane" in log.text
        assert_pushed(client)


def test_a_small_push_goes_in_few_messages(address: str, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs as much as two mebibytes of rows."""
    sent = after(0, lambda: None, monkeypatch)
    with connected(address, run) as client:
        client.push(ROWS, epoch=0, k=4, commit=False)
    assert len(sent) == ROWS.nbytes >> 20


@pytest.mark.skipif(not hasattr(os, "splice"), reason="this system splices nothing")
@pytest.mark.parametrize("wire_dtype", ["float32", "float16"])
def test_rows_that_lie_ready_go_into_a_unix_socket_without_a_copy(
    request: pytest.FixtureRequest, address: str, run: str, wire_dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    splice, moved = os.splice, [0]

    def counting(*arguments: int) -> int:
        moved[0] += (went := splice(*arguments))
        return went

    monkeypatch.setattr(os, "splice", counting)
    with connected(address, run) as client:
        client.push(np.tile(ROWS, (2, 1)), epoch=0, k=4, wire_dtype=wire_dtype, commit=False)
    ready = "from_another_host" not in request.fixturenames and wire_dtype == "float32"
    assert moved[0] == (2 * ROWS.nbytes if ready else 0)


def test_few_rows_do_not(address: str, run: str, log: pytest.LogCaptureFixture) -> None:
    with connected(address, run) as client:
        client.push(ROWS[:9], epoch=0, k=4, commit=False)
    assert "the connection is gRPC: these are few bytes" in log.text


def test_behind_a_proxy_everything_goes_through_it(
    service: LocalService, run: str, log: pytest.LogCaptureFixture
) -> None:
    with cutting_proxy(service.address, 1 << 40, 0) as proxy:
        with connected(proxy.address, run) as client:
            client.push(ROWS, epoch=0, k=4, commit=False)
        assert proxy.bytes_up > ROWS.nbytes
    assert "the connection is gRPC" in log.text


def test_a_published_port_goes_through_grpc(address: str, run: str, log: pytest.LogCaptureFixture) -> None:
    if address.startswith("unix:"):
        pytest.skip("a port is what this is about")

    def forward(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                down = listener.accept()[0]
            except OSError:
                return
            up = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
            for pair in ((down, up), (up, down)):
                threading.Thread(target=forward, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        with connected(f"127.0.0.1:{listener.getsockname()[1]}", run) as client:
            client.push(ROWS, epoch=0, k=4, commit=False)
        listener.shutdown(socket.SHUT_RDWR)
    assert "not the service's own: something stands between" in log.text


@pytest.fixture
def passing() -> Iterator[LocalService]:
    """A service that a test may do anything to."""
    with neighbour_service("--drain-seconds", "0.5") as started:
        yield started


def test_a_lane_that_is_gone_is_done_without(passing: LocalService, log: pytest.LogCaptureFixture) -> None:
    Path(passing.address.removeprefix("unix://") + ".bulk").unlink()
    with connected(passing.address, "gone") as client:
        client.push(ROWS, epoch=0, k=4, commit=False)
        assert_pushed(client)
    assert "the connection is gRPC" in log.text


@pytest.mark.parametrize("answer", [b"", b"\x00", b"\x03\x0a\x01x", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_rows_are_shown_to_the_service_alone(
    passing: LocalService, log: pytest.LogCaptureFixture, answer: bytes
) -> None:
    path = passing.address.removeprefix("unix://") + ".bulk"
    Path(path).unlink()
    heard: list[bytes] = []

    def pose(listener: socket.socket) -> None:
        connection = listener.accept()[0]
        heard.append(connection.recv(1 << 20))
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
        while data := connection.recv(1 << 20):
            heard.append(data)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        posing = threading.Thread(target=pose, args=(listener,))
        posing.start()
        with connected(passing.address, "posed") as client:
            client.push(ROWS, epoch=0, k=4, commit=False)
        posing.join()
    assert len(b"".join(heard)) < 100, "no row among them"
    assert "what is left goes through gRPC" in log.text


def test_a_cut_lane_is_taken_again(
    address: str, run: str, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(address, run) as client:
        sockets = client._wire._lane_sockets

        def cut() -> None:
            for each in list(sockets._open):
                each.shutdown(socket.SHUT_RDWR)

        sent = after(3, cut, monkeypatch)
        client.push(ROWS, epoch=0, k=4, commit=False)
        assert ROWS.nbytes <= sum(sent) < 2 * ROWS.nbytes
        assert_pushed(client)
    assert "rows of the broken stream had arrived" in log.text
    assert "goes through gRPC" not in log.text


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_a_push_goes_on_after_the_service_came_back(
    passing: LocalService, how: str, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act() -> None:
        getattr(passing, how)()
        passing.start()

    after(3, act, monkeypatch)
    with connected(passing.address, "back") as client:
        push = client.push(ROWS, epoch=0, k=4, timeout=60)
        assert push.rows_stored == N
        assert client.table(epoch=0, timeout=60).ids.shape == (N, 4)


DYING = """
import os, signal, sys
import numpy as np
from nearkin.v1 import bulk, frames
from nearkin_client import NeighbourClient, lane

send, sent = lane.send_rows, []
def dying(connection, message, rows, way):
    if len(sent) == 3:
        head = bulk.write_rows_head(message)
        frames.send_head(connection, head, message.payload.nbytes + bulk.WRITE_ROWS_TAIL_BYTES)
        connection.sendall(message.payload.cast("B")[:1000])
        os.kill(os.getpid(), signal.SIGKILL)
    sent.append(1)
    return send(connection, message, rows, way)
lane.send_rows = dying
NeighbourClient(sys.argv[1], run=sys.argv[2], shared_memory=False).push(
    np.load(sys.argv[3]), epoch=0, k=4, commit=False)
"""


def test_whoever_dies_in_the_middle_is_followed_by_another(address: str, run: str, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", ROWS)
    command = [sys.executable, "-c", DYING, address, run, str(tmp_path / "rows.npy")]
    assert subprocess.run(command, env=os.environ, check=False, timeout=60).returncode == -signal.SIGKILL
    with connected(address, run) as client:
        client.push(ROWS, epoch=0, k=4, commit=False)
        assert_pushed(client)


def test_many_writers_at_once(address: str, run: str) -> None:
    rows = np.random.default_rng(6).standard_normal((8 * N, WIDTH)).astype(np.float32)

    def write(part: int) -> None:
        with connected(address, run) as client:
            mine = rows[part * N : (part + 1) * N]
            client.push(mine, epoch=0, row_start=part * N, num_classes=len(rows), k=4)

    with ThreadPoolExecutor(8) as writers:
        list(writers.map(write, range(8)))
    with connected(address, run) as client:
        client.table(epoch=0, timeout=60)
        client.push(rows, epoch=0, k=4)  # compared with what is there


def test_a_wrong_row_is_named_in_the_middle_of_a_push(address: str, run: str) -> None:
    rows = ROWS.copy()
    rows[40, 7] = np.inf
    with connected(address, run) as client, pytest.raises(InvalidArgument, match="row 40") as caught:
        client.push(rows, epoch=0, k=4)
    assert caught.value.field == "payload"


def test_the_last_row_of_many_ranks_commits_and_says_what_is_wrong(address: str, run: str) -> None:
    """A zero row is found when the push is closed, by whoever sent the last rows."""
    half = N // 2
    rows = ROWS.copy()
    rows[half + 3] = 0
    with connected(address, run) as client:
        client.push(rows[:half], epoch=0, num_classes=N, k=4)
        with pytest.raises(InvalidArgument, match=f"row {half + 3} is all zero"):
            client.push(rows[half:], epoch=0, row_start=half, num_classes=N, k=4)
        client.push(ROWS[:half], epoch=1, num_classes=N, k=4)
        client.push(ROWS[half:], epoch=1, row_start=half, num_classes=N, k=4)
        assert client.table(epoch=1).ids.shape == (N, 4)


def test_a_flipped_bit_is_sent_again(
    address: str, run: str, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tails: list[bytes] = []
    write_rows_tail = bulk.write_rows_tail

    def flipping(crc: int, *, sound: bool) -> bytes:
        tails.append(write_rows_tail(crc ^ 1024 if len(tails) == 2 else crc, sound=sound))
        return tails[-1]

    monkeypatch.setattr(bulk, "write_rows_tail", flipping)
    with connected(address, run) as client:
        client.push(ROWS, epoch=0, k=4, commit=False)
        assert "sending it again" in log.text
        assert_pushed(client)


def test_closing_the_client_ends_its_lane(address: str, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connected(address, run)
    after(2, client.close, monkeypatch)
    with pytest.raises(Cancelled):
        client.push(ROWS, epoch=0, k=4, commit=False)


# -------------------------------------------------------------------------------------------------- tables


@pytest.fixture(scope="module")
def tall(service: LocalService) -> NeighbourTable:
    """Generation 1 of run "tall": some megabytes, in several blocks."""
    rows = np.random.default_rng(7).standard_normal((1200, 4)).astype(np.float32)
    with NeighbourClient(service.address, run="tall") as client:
        client.push(rows, epoch=0, k=1000)
        return client.table(epoch=0, timeout=60)


def assert_same(found: NeighbourTable, expected: NeighbourTable, rows: slice = slice(None)) -> None:
    np.testing.assert_array_equal(found.ids, expected.ids[rows])
    assert not found.ids.flags.writeable
    if found.scores is not None:
        assert expected.scores is not None
        np.testing.assert_array_equal(found.scores, expected.scores[rows])


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("rows", [None, (0, 1200), (3, 1190)])
def test_a_table_takes_the_lane(
    address: str,
    tall: NeighbourTable,
    rows: tuple[int, int] | None,
    scores: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lanes: list[int] = []
    read = Lane.read_table

    def noting(self: Lane, *arguments: Any) -> Any:
        lanes.append(1)
        return read(self, *arguments)

    monkeypatch.setattr(Lane, "read_table", noting)
    with connected(address, "tall") as client:
        found = client.table(generation=1, rows=rows, scores=scores)
    assert (found.scores is not None) is scores
    assert_same(found, tall, slice(*rows) if rows else slice(None))
    assert lanes


def test_behind_a_proxy_a_table_comes_through_it(
    service: LocalService, tall: NeighbourTable, log: pytest.LogCaptureFixture
) -> None:
    with cutting_proxy(service.address, 1 << 40, 0) as proxy, connected(proxy.address, "tall") as client:
        assert_same(client.table(generation=1), tall)
    assert "read through gRPC" in log.text


@pytest.mark.parametrize("flip", [0, 1_000_000], ids=["first", "later"])
def test_a_bit_that_flips_on_the_way_is_noticed(
    address: str,
    tall: NeighbourTable,
    flip: int,
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill, seen = frames.fill, [0]

    def flipping(connection: socket.socket, place: memoryview) -> None:
        fill(connection, place)
        if len(place) > 1000:
            if seen[0] <= flip < seen[0] + len(place):
                place[flip - seen[0]] ^= 16
            seen[0] += len(place)

    monkeypatch.setattr(frames, "fill", flipping)
    with connected(address, "tall") as client:
        assert_same(client.table(generation=1), tall)
    assert "reading it again" in log.text


def test_a_lane_that_is_cut_under_a_table_is_taken_again(
    address: str, tall: NeighbourTable, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill, pieces = frames.fill, []

    def cutting(connection: socket.socket, place: memoryview) -> None:
        pieces.append(len(place))
        if len(pieces) == 6:
            connection.shutdown(socket.SHUT_RDWR)
        fill(connection, place)

    monkeypatch.setattr(frames, "fill", cutting)
    with connected(address, "tall") as client:
        assert_same(client.table(generation=1), tall)
    assert "connection lost, trying again" in log.text


def test_many_readers_get_the_same(address: str, tall: NeighbourTable) -> None:
    def read(_: int) -> NeighbourTable:
        with connected(address, "tall") as client:
            return client.table(generation=1)

    with ThreadPoolExecutor(16) as readers:
        for found in readers.map(read, range(48)):
            assert_same(found, tall)
