"""Rows through shared memory: what is offered, what is taken from it, and that nothing is left behind."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crc32c
import grpc
import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service.operations import sharing
from numpy.typing import NDArray

from tests.service.conftest import (
    Caller,
    Service,
    Serving,
    brute_force,
    code_of,
    eventually,
    message,
    random_rows,
    refusal,
)

OFFSET = 4096


class Lent:
    """A segment as a client maps it."""

    def __init__(self, begun: pb.BeginPushResponse) -> None:
        self.offer = begun.shared_memory
        self.push_id = begun.push.push_id
        with Path(self.offer.path).open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), 0)

    def place(
        self, rows: NDArray[Any], start: int, offset: int = OFFSET, **changes: Any
    ) -> pb.WriteRowsRequest:
        """Puts rows into the segment; returns the message that names them."""
        data = rows.tobytes()
        self.memory[offset : offset + len(data)] = data
        self.memory[offset - 8 : offset] = b"\1" * 8
        fields: dict[str, Any] = {
            "push_id": self.push_id,
            "row_start": start,
            "shared_row_count": len(rows),
            "segment": self.offer.segment,
            "segment_offset": offset,
            "crc32c": crc32c.crc32c(data),
        }
        return pb.WriteRowsRequest(**fields | changes)


def lend(caller: Caller, rows: NDArray[Any], epoch: int = 0, **changes: Any) -> Lent:
    return Lent(caller.begin(rows, epoch, accept_shared_memory=True, **changes))


def send(caller: Caller, *requests: pb.WriteRowsRequest) -> pb.WriteRowsResponse:
    return caller.stub.WriteRows(iter(requests), timeout=30)


def segments(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "data" / "segments").iterdir())


def open_segments(tmp_path: Path) -> list[str]:
    """Where descriptors of this test's segments point."""
    links = (link for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    return [
        goal
        for goal in (str(link.resolve()) for link in links)
        if goal.startswith(f"{tmp_path}/data/segments/")
    ]


def test_rows_in_shared_memory_become_the_same_table(caller: Caller, tmp_path: Path) -> None:
    rows = random_rows(30, 8)
    lent = lend(caller, rows)
    assert Path(lent.offer.path).stat().st_size == lent.offer.size
    assert Path(lent.offer.path).stat().st_mode & 0o077 == 0
    places = [lent.place(rows[at : at + 10], at, OFFSET * (1 + at)) for at in (20, 0, 10)]
    assert send(caller, *places).complete
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))
    assert segments(tmp_path) == []  # the name goes with the first use: a client that dies leaves nothing


def test_a_place_is_free_once_its_rows_are_stored(caller: Caller) -> None:
    rows = random_rows(30, 8)
    lent = lend(caller, rows)
    for at in (0, 10, 20):  # always the same place
        send(caller, lent.place(rows[at : at + 10], at))
        assert lent.memory[OFFSET - 8 : OFFSET] == bytes(8)
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))


def test_what_a_client_writes_after_the_reply_changes_nothing(caller: Caller) -> None:
    rows = random_rows(30, 8)
    lent = lend(caller, rows)
    send(caller, lent.place(rows[:20], 0))
    lent.memory[:] = b"\xff" * len(lent.memory)
    caller.write(lent.push_id, rows[20:], 20)
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))


def test_damage_in_shared_memory_is_seen_and_not_stored(caller: Caller) -> None:
    rows = random_rows(30, 8)
    lent = lend(caller, rows)
    request = lent.place(rows, 0)
    lent.memory[OFFSET + 100] ^= 1
    assert code_of(refusal(lambda: send(caller, request))) is grpc.StatusCode.DATA_LOSS
    assert caller.state(lent.push_id).rows_stored == 0


def test_stored_rows_are_not_replaced_through_shared_memory(caller: Caller) -> None:
    rows = random_rows(30, 8)
    lent = lend(caller, rows)
    send(caller, lent.place(rows[:20], 0))
    send(caller, lent.place(rows[:20], 0))
    other = rows[10:] + 1
    assert code_of(refusal(lambda: send(caller, lent.place(other, 10)))) is grpc.StatusCode.ALREADY_EXISTS
    assert caller.state(lent.push_id).rows_stored == 20
    caller.write(lent.push_id, rows[20:], 20)
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"segment_offset": 0}, "segment_offset"),
        ({"segment_offset": 1 << 62}, "segment_offset"),
        ({"segment_offset": -8}, "segment_offset"),
        ({"shared_row_count": 1 << 62}, "shared_row_count"),
        ({"shared_row_count": -1}, "shared_row_count"),
        ({"shared_row_count": 31}, "row_start"),
        ({"segment": "../../nearkin.json"}, "segment"),
        ({"segment": ""}, "segment"),
        ({"payload": b"1234"}, "payload"),
    ],
)
def test_places_that_there_are_not_are_refused(caller: Caller, changes: dict[str, Any], field: str) -> None:
    rows = random_rows(30, 8)
    lent = lend(caller, rows)
    error = refusal(lambda: send(caller, lent.place(rows, 0, **changes)))
    assert code_of(error) is grpc.StatusCode.INVALID_ARGUMENT
    assert str(error.details()).startswith(field)
    assert caller.state(lent.push_id).rows_stored == 0


def test_a_segment_belongs_to_one_push(caller: Caller) -> None:
    rows = random_rows(30, 8)
    lent, other = lend(caller, rows), lend(caller, rows, epoch=1)
    error = refusal(lambda: send(caller, lent.place(rows, 0, push_id=other.push_id)))
    assert code_of(error) is grpc.StatusCode.INVALID_ARGUMENT


def test_a_client_that_cuts_its_segment_short_harms_nobody(caller: Caller) -> None:
    rows = random_rows(30, 8)
    lent = lend(caller, rows)
    request = lent.place(rows, 0)
    os.truncate(lent.offer.path, 0)
    assert code_of(refusal(lambda: send(caller, request))) is grpc.StatusCode.INVALID_ARGUMENT
    caller.write(lent.push_id, rows)
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))


def test_rows_without_a_checksum_are_refused(caller: Caller) -> None:
    rows = random_rows(30, 8)
    request = lend(caller, rows).place(rows, 0)
    request.ClearField("crc32c")
    assert code_of(refusal(lambda: send(caller, request))) is grpc.StatusCode.INVALID_ARGUMENT


def test_nothing_is_offered_over_tcp_or_unasked(start_service: Callable[..., Service]) -> None:
    service = start_service(listen=("127.0.0.1:0",))
    begun = service.caller().begin(random_rows(30, 8), accept_shared_memory=True)
    assert not begun.HasField("shared_memory")


def test_nothing_is_offered_to_who_does_not_ask(caller: Caller) -> None:
    assert not caller.begin(random_rows(30, 8)).HasField("shared_memory")


def test_an_unused_segment_goes_by_itself(
    monkeypatch: pytest.MonkeyPatch, caller: Caller, tmp_path: Path
) -> None:
    monkeypatch.setattr(sharing, "IDLE_SECONDS", 0.2)
    rows = random_rows(30, 8)
    begun = caller.begin(rows, accept_shared_memory=True)
    assert len(segments(tmp_path)) == 1
    eventually(lambda: segments(tmp_path), lambda left: left == [])
    eventually(lambda: open_segments(tmp_path), lambda descriptors: descriptors == [])
    caller.write(begun.push.push_id, rows)


def test_segments_are_lent_up_to_a_bound(monkeypatch: pytest.MonkeyPatch, caller: Caller) -> None:
    rows = random_rows(30, 8)
    size = caller.begin(rows, accept_shared_memory=True).shared_memory.size
    monkeypatch.setattr(sharing, "MAX_SHARED_BYTES", 2 * size)
    assert caller.begin(rows, accept_shared_memory=True).HasField("shared_memory")
    assert not caller.begin(rows, accept_shared_memory=True).HasField("shared_memory")


def test_a_killed_service_leaves_no_segment_to_the_next(
    serve: Callable[..., Serving], tmp_path: Path
) -> None:
    serving = serve()
    rows = random_rows(30, 8)
    begun = serving.caller().begin(rows, accept_shared_memory=True)
    assert len(segments(tmp_path)) == 1
    serving.kill()
    caller = serve().caller()
    assert segments(tmp_path) == []
    caller.write(begun.push.push_id, rows)
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))


# -------------------------------------------------------------------------------------------------- spares


def test_a_rows_file_is_written_again_and_shows_nothing_of_before(caller: Caller, tmp_path: Path) -> None:
    rows = random_rows(30, 8)
    for epoch in range(4):
        caller.push(rows + epoch, epoch)
    spares = tmp_path / "data" / "spares"
    dropped = {pb.EMBEDDINGS_STATE_DROPPED}
    eventually(lambda: {g.embeddings for g in caller.generations() if g.generation < 3}, dropped.__eq__)
    there = eventually(lambda: list(spares.iterdir()), bool)
    begun = caller.begin(rows, 4, absent=[3, 29])
    assert len(list(spares.iterdir())) == len(there) - 1
    push_id = begun.push.push_id
    for request in (message(push_id, rows[:3], 0), message(push_id, rows[4:29], 4)):
        send(caller, request)
    expected = rows.copy()
    expected[[3, 29]] = 0
    digest = crc32c.crc32c(expected.tobytes())
    caller.stub.CommitPush(pb.CommitPushRequest(push_id=push_id, rows_crc32c=digest), timeout=30)
    np.testing.assert_array_equal(caller.table(min_epoch=4).ids, brute_force(rows, 5, [3, 29]))


def test_a_rows_file_that_is_open_elsewhere_is_not_written_again(caller: Caller, tmp_path: Path) -> None:
    rows = random_rows(30, 8)
    caller.push(rows, 0)
    path = tmp_path / "data" / "runs" / "run" / "generations" / "1" / "rows.bin"
    mapped = np.memmap(path, np.float32, mode="r")
    for epoch in range(1, 5):
        caller.push(rows + epoch, epoch)
    np.testing.assert_array_equal(mapped.reshape(rows.shape), rows)
