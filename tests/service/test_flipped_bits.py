"""Any bit of a message of rows may flip on its way: they come to where they belong, or not at all."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from crc32c import crc32c
from nearkin.v1 import bulk
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service.store import as_bytes

from tests.service.conftest import WAIT, Caller, code_of, random_rows, refusal
from tests.service.test_bulk_lane import let_in

ROWS = random_rows(64, 2)
SENT = slice(8, 12)
METHOD = "/nearkin.v1.NeighbourService/WriteRows"


def flipped(data: bytes) -> Iterator[bytes]:
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


class Push:
    """One that is begun anew whenever something was stored of it, after a look at what that is."""

    def __init__(self, caller: Caller, data: Path) -> None:
        self._caller = caller
        self._data = data
        self.begin()

    def begin(self) -> None:
        asked: dict[str, Any] = {"commit_when_complete": False, "accept_bulk_lane": True}
        begun = self._caller.begin(ROWS, **asked)
        self.push_id, self.lane = begun.push.push_id, begun.bulk_lane

    def message(self, **changes: Any) -> bulk.WriteRows:
        return bulk.WriteRows(self.push_id, SENT.start, as_bytes(ROWS[SENT]), **changes)

    def holds_nothing_but_what_was_sent(self) -> bool:
        """Whether it holds that."""
        stored = self._caller.state(self.push_id).stored
        if not stored:
            return False
        assert [(each.start, each.count) for each in stored] == [(SENT.start, SENT.stop - SENT.start)]
        (path,) = self._data.glob(f"runs/run/pushes/{self.push_id}/rows.bin")
        held = np.fromfile(path, np.float32).reshape(ROWS.shape)
        np.testing.assert_array_equal(held[SENT], ROWS[SENT])
        self._caller.stub.AbortPush(pb.AbortPushRequest(push_id=self.push_id), timeout=WAIT)
        self.begin()
        return True


@pytest.fixture
def push(caller: Caller, tmp_path: Path) -> Push:
    return Push(caller, tmp_path / "data")


def test_of_a_message_of_grpc(caller: Caller, push: Push) -> None:
    send: Callable[..., Any] = caller.channel.stream_unary(METHOD)
    stored = 0
    for number in range(8 * len(bulk.encode_write_rows(push.message(crc32c=1)))):
        message = push.message(crc32c=crc32c(ROWS[SENT].tobytes()))
        data = list(flipped(bulk.encode_write_rows(message)))[number]
        with contextlib.suppress(grpc.RpcError):
            send(iter([data]), timeout=WAIT)
        stored += push.holds_nothing_but_what_was_sent()
    assert 0 < stored < 100, "some bits say nothing of the rows"


def test_of_a_message_on_the_bulk_lane(caller: Caller, push: Push) -> None:
    stored = 0
    whole = _on_the_lane(push)
    for number in range(8 * len(whole)):
        data = list(flipped(_on_the_lane(push)))[number]
        with let_in(caller, push.lane) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
        stored += push.holds_nothing_but_what_was_sent()
    assert 0 < stored < 100, "some bits say nothing of the rows"


def _on_the_lane(push: Push) -> bytes:
    """A message behind its length, its checksum behind the rows."""
    tail = bulk.write_rows_tail(crc32c(ROWS[SENT].tobytes()), sound=False)
    message = bulk.write_rows_head(push.message()) + ROWS[SENT].tobytes() + tail
    return bulk.varint(len(message)) + message


@pytest.mark.parametrize("row_start", [0, 9, 60])
def test_rows_of_another_place_are_data_loss(caller: Caller, push: Push, row_start: int) -> None:
    request = pb.WriteRowsRequest.FromString(bulk.encode_write_rows(push.message()))
    request.row_start = row_start
    error = refusal(lambda: caller.stub.WriteRows(iter([request]), timeout=WAIT))
    assert code_of(error) is grpc.StatusCode.DATA_LOSS
    assert "place_crc32c" in str(error.details())
