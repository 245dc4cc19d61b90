"""Rows written in place: what is lent, what is taken, who is kept away, and that nothing is left behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crc32c
import grpc
import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service.operations import lending
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


class Lent:
    """Rows of a push as their borrower sees them."""

    def __init__(self, begun: pb.BeginPushResponse) -> None:
        self.offer = begun.lent_rows
        self.push_id = begun.push.push_id

    def write(self, rows: NDArray[Any], start: int) -> None:
        with Path(self.offer.path).open("r+b") as file:
            file.seek(self.offer.rows_at + start * rows[0].nbytes)
            file.write(rows.tobytes())

    def message(self, rows: NDArray[Any], start: int, **changes: Any) -> pb.WriteRowsRequest:
        """The message that says these rows are there."""
        fields: dict[str, Any] = {
            "push_id": self.push_id,
            "row_start": start,
            "shared_row_count": len(rows),
            "loan": self.offer.loan,
            "crc32c": crc32c.crc32c(rows.tobytes()),
        }
        return pb.WriteRowsRequest(**fields | changes)

    def written(self, rows: NDArray[Any], start: int, **changes: Any) -> pb.WriteRowsRequest:
        self.write(rows, start)
        return self.message(rows, start, **changes)


def lend(
    caller: Caller,
    rows: NDArray[Any],
    epoch: int = 0,
    start: int = 0,
    count: int | None = None,
    **changes: Any,
) -> Lent:
    asked = {
        "accept_shared_memory": True,
        "row_start": start,
        "row_count": len(rows) if count is None else count,
    }
    return Lent(caller.begin(rows, epoch, **asked | changes))


def send(caller: Caller, *requests: pb.WriteRowsRequest) -> pb.WriteRowsResponse:
    return caller.stub.WriteRows(iter(requests), timeout=30)


def files(tmp_path: Path) -> set[str]:
    return {str(path.relative_to(tmp_path)) for path in (tmp_path / "data").rglob("*") if path.is_file()}


def test_rows_written_in_place_become_the_same_table(caller: Caller) -> None:
    rows = random_rows(30, 8)
    lent = lend(caller, rows)
    messages = [lent.written(rows[at : at + 10], at) for at in (20, 0, 10)]
    assert send(caller, *messages).complete
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))


@pytest.mark.parametrize("rows_at", [16, 48])
def test_a_file_begins_where_its_first_caller_would_have_it(caller: Caller, rows_at: int) -> None:
    rows = random_rows(30, 7)
    lent = lend(caller, rows, count=10, rows_at=rows_at)
    other = lend(caller, rows, start=10, count=10, rows_at=0)
    assert (lent.offer.rows_at, other.offer.rows_at) == (rows_at, rows_at)
    assert Path(lent.offer.path).stat().st_size == rows_at + rows.nbytes
    send(caller, lent.written(rows[:10], 0))
    send(caller, other.written(rows[10:20], 10, sound=True))
    caller.write(lent.push_id, rows[20:], 20)
    caller.write(lent.push_id, rows[5:15], 5)  # compared
    error = refusal(lambda: caller.write(lent.push_id, rows[5:15] + 1, 5))
    assert code_of(error) is grpc.StatusCode.ALREADY_EXISTS
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))
    changed = caller.begin(rows, 1, base_generation=1, commit_when_complete=False).push.push_id
    caller.write(changed, rows[:2] + 1)
    caller.stub.CommitPush(pb.CommitPushRequest(push_id=changed), timeout=30)
    expected = np.concatenate([rows[:2] + 1, rows[2:]])
    np.testing.assert_array_equal(caller.table(min_epoch=1).ids, brute_force(expected, 5))


def test_who_does_not_know_where_a_file_begins_is_lent_nothing_of_it(caller: Caller) -> None:
    rows = random_rows(30, 8)
    lent = lend(caller, rows, count=10, rows_at=32)
    assert not caller.begin(rows, accept_shared_memory=True, row_start=10, row_count=20).HasField("lent_rows")
    caller.write(lent.push_id, rows[10:], 10)
    send(caller, lent.written(rows[:10], 0))
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))


@pytest.mark.parametrize("rows_at", [-16, 8, 64])
def test_a_file_begins_nowhere_else(caller: Caller, rows_at: int) -> None:
    error = refusal(lambda: lend(caller, random_rows(30, 8), rows_at=rows_at))
    assert code_of(error) is grpc.StatusCode.INVALID_ARGUMENT
    assert str(error.details()).startswith("rows_at")


def test_a_file_that_begins_elsewhere_outlives_its_service(
    serve: Callable[..., Serving], tmp_path: Path
) -> None:
    rows = random_rows(30, 7)
    serving = serve()
    lent = lend(serving.caller(), rows, rows_at=48)
    send(serving.caller(), lent.written(rows[:10], 0))
    serving.kill()
    serving = serve()
    again = lend(serving.caller(), rows, start=10, count=20)
    assert not again.offer.path, "it would be written from byte 0 on"
    again = lend(serving.caller(), rows, start=10, count=20, rows_at=0)
    assert again.offer.rows_at == 48
    send(serving.caller(), again.written(rows[10:], 10))
    np.testing.assert_array_equal(serving.caller().table(min_epoch=0).ids, brute_force(rows, 5))
    serving.kill()
    found = serve().caller().nearest([3], k=5)
    assert list(found.rows[0].ids) == brute_force(rows, 5)[3].tolist()
    (stored,) = tmp_path.glob("*/runs/run/generations/1/rows.bin")
    assert stored.read_bytes()[48:] == rows.tobytes()


@pytest.mark.parametrize("row_elements", [1, 7, 100_003])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_of_any_width_are_looked_through(caller: Caller, row_elements: int, dtype: str) -> None:
    rows = random_rows(30, row_elements)
    sent = rows.astype(dtype)
    lent = lend(caller, rows, dtype=pb.DType.Value(f"DTYPE_{dtype.upper()}"))
    assert send(caller, lent.written(sent[:17], 0), lent.written(sent[17:], 17)).complete
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(sent.astype(np.float32), 5))


def test_several_borrowers_and_a_sender_side_by_side(caller: Caller) -> None:
    rows = random_rows(30, 8)
    first, last = lend(caller, rows, count=10), lend(caller, rows, start=20, count=10)
    send(caller, last.written(rows[20:], 20))
    caller.write(first.push_id, rows[10:20], 10)
    send(caller, first.written(rows[:10], 0))
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))


def test_rows_are_lent_to_one_caller_at_a_time(caller: Caller) -> None:
    rows = random_rows(30, 8)
    lent = lend(caller, rows, count=20)
    again = lend(caller, rows, start=19, count=11)
    assert lent.offer.loan
    assert (again.offer.path, again.offer.loan) == (lent.offer.path, "")
    assert lend(caller, rows, start=20, count=10).offer.loan


def test_who_sends_lent_rows_waits_and_is_compared(caller: Caller) -> None:
    """Overlapping ranges with different bytes never mix, whichever way they come."""
    rows = random_rows(30, 8)
    lent = lend(caller, rows)
    outcomes: list[str] = []

    def send_others() -> None:
        try:
            caller.write(lent.push_id, rows[10:20] + 1, 10)
        except grpc.RpcError as error:
            outcomes.append(str(code_of(error)))

    other = threading.Thread(target=send_others)
    other.start()
    other.join(0.3)
    assert other.is_alive()
    send(caller, lent.written(rows, 0))
    other.join(10)
    assert outcomes == [str(grpc.StatusCode.ALREADY_EXISTS)]
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))


def test_stored_rows_are_sent_by_their_borrower_to_be_compared(caller: Caller) -> None:
    rows = random_rows(30, 8)
    caller.write(caller.begin(rows).push.push_id, rows[5:10], 5)
    lent = lend(caller, rows)
    same = message(lent.push_id, rows[5:10], 5)
    same.loan = lent.offer.loan
    other = message(lent.push_id, rows[5:10] + 1, 5)
    other.loan = lent.offer.loan
    assert code_of(refusal(lambda: send(caller, other))) is grpc.StatusCode.ALREADY_EXISTS
    send(caller, same, lent.written(rows[:5], 0), lent.written(rows[10:], 10))
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))


def test_the_same_message_again_is_harmless(caller: Caller) -> None:
    rows = random_rows(30, 8)
    lent = lend(caller, rows)
    first = lent.written(rows[:20], 0)
    last = lent.written(rows[10:], 10)
    send(caller, first, first, last, first)
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))
    send(caller, last)  # published meanwhile
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))


def test_what_a_client_writes_after_the_reply_never_reaches_a_table(caller: Caller) -> None:
    rows = random_rows(30, 8)
    lent = lend(caller, rows)
    send(caller, lent.written(rows[:20], 0))
    lent.write(rows[3:4] + 1, 3)
    caller.write(lent.push_id, rows[20:], 20)
    error = refusal(lambda: caller.table(min_epoch=0))
    assert "rows 0..19 are not what arrived" in str(error.details())


def test_damage_is_seen_and_mended_by_writing_again(caller: Caller) -> None:
    rows = random_rows(30, 8)
    lent = lend(caller, rows)
    damaged = rows.copy()
    damaged.view(np.uint8)[4, 3] ^= 1
    lent.write(damaged, 0)
    error = refusal(lambda: send(caller, lent.message(rows, 0)))
    assert code_of(error) is grpc.StatusCode.DATA_LOSS
    assert caller.state(lent.push_id).rows_stored == 0
    send(caller, lent.written(rows, 0))
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_said_to_be_sound_are_compared_in_the_build(caller: Caller, dtype: str) -> None:
    rows = random_rows(30, 8).astype(dtype)
    changes = {"dtype": pb.DType.Value(f"DTYPE_{dtype.upper()}")}
    lent = lend(caller, rows, **changes)
    damaged = rows.copy()
    damaged.view(np.uint8)[24, 3] ^= 1
    lent.write(damaged, 0)
    first, last = lent.message(rows[:20], 0, sound=True), lent.message(rows[20:], 20, sound=True)
    send(caller, first, last)  # the push may have failed by the time this is answered
    error = refusal(lambda: caller.table(min_epoch=0))
    assert "rows 20..29 are not what arrived" in str(error.details())
    assert not caller.generations()
    again = lend(caller, rows, **changes)
    assert send(caller, again.written(rows, 0, sound=True)).complete
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows.astype(np.float32), 5))


@pytest.mark.parametrize("odd", [np.nan, np.inf, 0])
def test_rows_wrongly_said_to_be_sound_reach_no_table(caller: Caller, odd: float) -> None:
    caller.push(random_rows(30, 8), 0)
    rows = random_rows(30, 8)
    rows[17] = odd
    send(caller, lend(caller, rows, epoch=1).written(rows, 0, sound=True))
    error = refusal(lambda: caller.table(min_epoch=1))
    assert "class 17" in str(error.details())
    assert [each.epoch for each in caller.generations()] == [0]


def test_sound_rows_that_are_there_already_are_compared_at_once(caller: Caller) -> None:
    rows = random_rows(30, 8)
    lent = lend(caller, rows)
    send(caller, lent.written(rows[:20], 0, sound=True), lent.written(rows[10:], 10, sound=True))
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_rows_that_are_no_numbers_are_named_or_blanked_if_absent(caller: Caller, odd: float) -> None:
    rows = random_rows(30, 8)
    rows[17, 2] = odd
    rows[21] = 0
    lent = lend(caller, rows, absent=[21])
    error = refusal(lambda: send(caller, lent.written(rows, 0)))
    assert code_of(error) is grpc.StatusCode.INVALID_ARGUMENT
    assert "row 17" in str(error.details())
    lent = lend(caller, rows, epoch=1, absent=[17, 21])
    send(caller, lent.written(rows, 0))
    rows[17] = 0
    np.testing.assert_array_equal(caller.table(min_epoch=1).ids, brute_force(rows, 5, [17, 21]))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"shared_row_count": 1 << 62}, "shared_row_count"),
        ({"shared_row_count": -1}, "shared_row_count"),
        ({"shared_row_count": 31}, "row_start"),
        ({"row_start": -1}, "row_start"),
        ({"row_start": 1 << 62}, "row_start"),
        ({"loan": "../../nearkin.json"}, "loan"),
        ({"loan": ""}, "loan"),
        ({"payload": b"1234"}, "payload"),
        ({"crc32c": None}, "crc32c"),
    ],
)
def test_rows_that_are_not_lent_are_refused(caller: Caller, changes: dict[str, Any], field: str) -> None:
    rows = random_rows(30, 8)
    lent = lend(caller, rows)
    error = refusal(lambda: send(caller, lent.written(rows, 0, **changes)))
    assert code_of(error) is grpc.StatusCode.INVALID_ARGUMENT
    assert str(error.details()).startswith(field)
    assert caller.state(lent.push_id).rows_stored == 0


@pytest.mark.parametrize(("start", "count"), [(0, 31), (30, 1), (-1, 5), (1 << 62, 1 << 62), (0, -1)])
def test_rows_that_there_are_not_are_not_lent(caller: Caller, start: int, count: int) -> None:
    error = refusal(lambda: lend(caller, random_rows(30, 8), start=start, count=count))
    assert code_of(error) is grpc.StatusCode.INVALID_ARGUMENT
    assert str(error.details()).startswith("row_start")


def test_a_loan_belongs_to_one_push(caller: Caller) -> None:
    rows = random_rows(30, 8)
    lent, other = lend(caller, rows), lend(caller, rows, epoch=1)
    error = refusal(lambda: send(caller, lent.written(rows, 0, push_id=other.push_id)))
    assert code_of(error) is grpc.StatusCode.INVALID_ARGUMENT


def test_a_client_that_cuts_the_file_short_loses_its_own_push_and_no_other(caller: Caller) -> None:
    rows = random_rows(30, 8)
    lent = lend(caller, rows)
    request = lent.written(rows, 0)
    os.truncate(lent.offer.path, 0)
    assert code_of(refusal(lambda: send(caller, request))) is grpc.StatusCode.DATA_LOSS
    caller.push(rows, 1)
    np.testing.assert_array_equal(caller.table(min_epoch=1).ids, brute_force(rows, 5))


def test_cutting_less_than_what_is_before_the_rows_is_seen_as_well(caller: Caller) -> None:
    rows = random_rows(30, 8)
    lent = lend(caller, rows, rows_at=48)
    request = lent.written(rows, 0)
    os.truncate(lent.offer.path, 16 + rows.nbytes)
    assert code_of(refusal(lambda: send(caller, request))) is grpc.StatusCode.DATA_LOSS


def test_nothing_is_lent_over_tcp(start_service: Callable[..., Service]) -> None:
    service = start_service(listen=("127.0.0.1:0",))
    begun = service.caller().begin(random_rows(30, 8), accept_shared_memory=True, row_count=30)
    assert not begun.HasField("lent_rows")


def test_but_to_who_can_find_out_that_he_is_on_this_host(start_service: Callable[..., Service]) -> None:
    caller = start_service(listen=("127.0.0.1:0",)).caller()
    rows = random_rows(30, 8)
    lent = lend(caller, rows, accept_bulk_lane=True)
    send(caller, lent.written(rows, 0))
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))
    asked = pb.ReadTableRequest(run="run", accept_shared_memory=True, accept_bulk_lane=True)
    (header,) = caller.stub.ReadTable(asked, timeout=30)
    assert np.fromfile(header.header.ids_path, np.int32).tobytes() == caller.table().ids.tobytes()
    assert header.header.bulk_lane.HasField("local")


@pytest.mark.usefixtures("from_another_host")
def test_nothing_is_lent_to_another_host(start_service: Callable[..., Service]) -> None:
    caller = start_service(listen=("127.0.0.1:0",)).caller()
    rows = random_rows(30, 8)
    asked = {"accept_shared_memory": True, "accept_bulk_lane": True, "row_count": 30}
    begun = caller.begin(rows, **asked)
    assert not begun.HasField("lent_rows")
    assert not begun.bulk_lane.HasField("local")
    assert begun.bulk_lane.doors


def test_nothing_is_lent_to_who_does_not_ask(caller: Caller) -> None:
    assert not caller.begin(random_rows(30, 8), row_count=30).HasField("lent_rows")
    assert not caller.begin(random_rows(30, 8), accept_shared_memory=True).HasField("lent_rows")


def test_a_loan_ends_with_its_stream(caller: Caller) -> None:
    """Whoever sends only some of the rows lent is in nobody's way afterwards."""
    rows = random_rows(30, 8)
    lent = lend(caller, rows)
    send(caller, lent.written(rows[:10], 0))
    caller.write(lent.push_id, rows[10:], 10)
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))
    lent = lend(caller, rows, epoch=1)
    send(caller, lent.written(rows[:10], 0))
    error = refusal(lambda: send(caller, lent.written(rows[10:], 10)))
    assert str(error.details()).startswith("loan")


def test_an_unused_loan_goes_by_itself(monkeypatch: pytest.MonkeyPatch, caller: Caller) -> None:
    monkeypatch.setattr(lending, "UNUSED_SECONDS", 0.2)
    rows = random_rows(30, 8)
    lent = lend(caller, rows)
    eventually(lambda: lend(caller, rows).offer.loan, bool)
    assert str(refusal(lambda: send(caller, lent.written(rows, 0))).details()).startswith("loan")


def test_a_push_is_aborted_although_its_rows_are_lent(caller: Caller, tmp_path: Path) -> None:
    rows = random_rows(30, 8)
    lent = lend(caller, rows)
    caller.stub.AbortPush(pb.AbortPushRequest(push_id=lent.push_id), timeout=30)
    eventually(lambda: files(tmp_path), lambda left: not any(path.endswith("rows.bin") for path in left))
    again = lend(caller, rows)
    send(caller, again.written(rows, 0))
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))


def test_a_killed_service_takes_its_loans_along(serve: Callable[..., Serving]) -> None:
    serving = serve()
    rows = random_rows(30, 8)
    lent = lend(serving.caller(), rows)
    send(serving.caller(), lent.written(rows[:10], 0))
    serving.kill()
    caller = serve().caller()
    assert str(refusal(lambda: send(caller, lent.message(rows, 0))).details()).startswith("loan")
    assert caller.state(lent.push_id).rows_stored == 10
    again = lend(caller, rows, start=10, count=20)
    send(caller, again.written(rows[10:], 10))
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))


# -------------------------------------------------------------------------------------------------- spares


def test_a_rows_file_is_written_again_and_shows_nothing_of_before(caller: Caller, tmp_path: Path) -> None:
    rows = random_rows(30, 8)
    for epoch in range(4):
        caller.push(rows + epoch, epoch)
    spares = tmp_path / "data" / "spares"
    dropped = {pb.EMBEDDINGS_STATE_DROPPED}
    eventually(lambda: {g.embeddings for g in caller.generations() if g.generation < 3}, dropped.__eq__)
    eventually(lambda: list(spares.iterdir()), bool)
    push_id = caller.begin(rows, 4, absent=[3, 29]).push.push_id
    (again,) = tmp_path.glob(f"data/runs/run/pushes/{push_id}/rows.bin")
    assert again.stat().st_blocks  # a new file has none
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
