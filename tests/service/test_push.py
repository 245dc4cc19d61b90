"""Pushing: many writers in any order, the same rows twice, refusals that leave nothing behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import crc32c
import grpc
import ml_dtypes
import numpy as np
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service.config import Limits

from tests.service.conftest import (
    WAIT,
    Caller,
    brute_force,
    code_of,
    eventually,
    message,
    messages,
    random_rows,
    refusal,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
EXISTS = grpc.StatusCode.ALREADY_EXISTS
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


def bad_field(error: grpc.Call) -> str:
    """The field that a google.rpc.BadRequest names."""
    status = rpc_status.from_call(error)
    details = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(details)
    (violation,) = details.field_violations
    return str(violation.field)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 2, 2)])
def test_a_pushed_epoch_becomes_its_table(caller: Caller, dtype: Any, shape: tuple[int, ...]) -> None:
    rows = random_rows(60, *shape, dtype=dtype)
    if shape == (1,):
        rows = np.sign(rows).astype(dtype)
    caller.push(rows, k=9)
    table = caller.table()
    np.testing.assert_array_equal(table.ids, brute_force(rows, 9))
    assert table.generation.generation == 1


def test_what_a_push_notes_of_itself_reaches_the_disk_at_once(
    caller: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for that, but a machine that dies in the middle of a long push finds it again."""
    synced, fsync = set[Path](), os.fsync

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(os, "fsync", noting)
    rows = random_rows(20, 4)
    push_id = caller.begin(rows, commit_when_complete=False).push.push_id
    pushes = tmp_path / "data/runs/run/pushes"
    wanted = {pushes, pushes / push_id, pushes / push_id / "push.json", pushes / push_id / "journal"}
    eventually(lambda: wanted <= synced, bool)
    caller.write(push_id, rows)
    synced.clear()
    caller.stub.CommitPush(pb.CommitPushRequest(push_id=push_id), timeout=WAIT)
    eventually(lambda: any(path.name == "journal" for path in synced), bool)


def test_ranks_push_in_any_order_and_at_once(caller: Caller) -> None:
    rows, shards = random_rows(400, 32), 8
    push_id = caller.begin(rows).push.push_id

    def rank(number: int) -> None:
        assert caller.begin(rows).push.push_id == push_id
        start = 50 * number
        pieces = messages(push_id, rows[start : start + 50], start, 7)
        caller.stub.WriteRows(iter(reversed(pieces)))

    ranks = [threading.Thread(target=rank, args=(number,)) for number in reversed(range(shards))]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5))


def test_joining_with_other_arguments_names_the_field(caller: Caller) -> None:
    rows = random_rows(10, 4)
    caller.begin(rows, k=3)
    error = refusal(lambda: caller.begin(rows, k=4))
    assert error.code() is EXISTS
    assert "k is 3, not 4" in error.details()


def test_absent_is_the_union_and_its_rows_are_not_needed(caller: Caller) -> None:
    rows = random_rows(30, 8)
    push_id = caller.begin(rows, absent=[3], commit_when_complete=False).push.push_id
    joined = caller.begin(rows, absent=[4, 3, 29], commit_when_complete=True).push
    assert joined.absent_count == 3
    caller.write(push_id, rows[:3])
    caller.write(push_id, rows[5:29], start=5)
    table = caller.table(min_epoch=0)
    np.testing.assert_array_equal(table.ids, brute_force(rows, 5, absent=[3, 4, 29]))
    assert table.scores is not None
    assert np.isneginf(table.scores[[3, 4, 29]]).all()
    assert table.generation.absent_count == 3


def test_rows_of_absent_classes_may_hold_anything(caller: Caller) -> None:
    rows = random_rows(20, 4)
    rows[7] = np.nan
    rows[8] = 0
    push_id = caller.begin(rows, absent=[7, 8]).push.push_id
    caller.write(push_id, rows[:10])
    caller.write(push_id, rows[:10])
    caller.write(push_id, rows[10:], start=10)
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(rows, 5, absent=[7, 8]))


def test_the_same_rows_twice_are_harmless_other_bytes_are_not(caller: Caller) -> None:
    rows = random_rows(20, 4)
    push_id = caller.begin(rows, commit_when_complete=False).push.push_id
    caller.write(push_id, rows[:10])
    assert caller.write(push_id, rows[5:15], start=5).rows_stored == 15
    changed = rows[10:20].copy()
    changed[4, 2] += 1
    error = refusal(lambda: caller.write(push_id, changed, start=10))
    assert error.code() is EXISTS
    assert "row 14" in error.details()
    assert caller.state(push_id).rows_stored == 15, "nothing of a refused message is kept"


def test_a_published_epoch_is_joined_and_compared(caller: Caller) -> None:
    rows = random_rows(20, 4)
    push_id = caller.push(rows)
    again = caller.begin(rows)
    assert again.push.push_id == push_id
    assert again.push.state == pb.PUSH_STATE_PUBLISHED
    assert caller.write(push_id, rows).complete
    error = refusal(lambda: caller.write(push_id, rows[::-1].copy()))
    assert error.code() is EXISTS
    assert [g.generation for g in caller.generations()] == [1]


def test_commit_waits_for_every_row(caller: Caller) -> None:
    rows = random_rows(20, 4)
    push_id = caller.begin(rows, commit_when_complete=False).push.push_id
    caller.write(push_id, rows[:5])
    caller.write(push_id, rows[9:], start=9)
    error = refusal(lambda: caller.stub.CommitPush(pb.CommitPushRequest(push_id=push_id)))
    assert error.code() is PRECONDITION
    assert "5..8" in error.details()
    response = caller.write(push_id, rows[5:9], start=5)
    assert response.complete
    assert response.push.state == pb.PUSH_STATE_OPEN
    wrong = crc32c.crc32c(rows.tobytes()) ^ 1
    request = pb.CommitPushRequest(push_id=push_id, rows_crc32c=wrong)
    assert refusal(lambda: caller.stub.CommitPush(request)).code() is grpc.StatusCode.DATA_LOSS
    request = pb.CommitPushRequest(push_id=push_id, rows_crc32c=wrong ^ 1)
    for _ in range(2):
        state = caller.stub.CommitPush(request).state
        assert state in (pb.PUSH_STATE_BUILDING, pb.PUSH_STATE_PUBLISHED)
    assert caller.ended(push_id).state == pb.PUSH_STATE_PUBLISHED


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused_and_named(caller: Caller, dtype: Any, value: float) -> None:
    rows = random_rows(20, 6, dtype=dtype)
    push_id = caller.begin(rows).push.push_id
    bad = rows.copy()
    bad[[13, 17], 5] = value
    error = refusal(lambda: caller.write(push_id, bad))
    assert error.code() is INVALID
    assert bad_field(error) == "payload"
    assert "row 13" in error.details()
    assert caller.state(push_id).rows_stored == 0
    assert caller.write(push_id, rows).complete


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_extreme_but_finite_rows_are_welcome(caller: Caller, dtype: Any) -> None:
    limits = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    rows = random_rows(8, 4, dtype=dtype)
    rows[0] = limits.max
    rows[1] = limits.smallest_subnormal
    push_id = caller.begin(rows, commit_when_complete=False).push.push_id
    assert caller.write(push_id, rows).rows_stored == 8


def test_a_zero_row_ends_the_push_and_the_epoch_can_be_begun_again(caller: Caller) -> None:
    rows = random_rows(20, 4)
    rows[11] = -0.0
    push_id = caller.begin(rows).push.push_id
    error = refusal(lambda: caller.write(push_id, rows))
    assert error.code() is INVALID
    assert "row 11 is all zero" in error.details()
    failed = caller.state(push_id)
    assert failed.state == pb.PUSH_STATE_FAILED
    assert "row 11" in failed.error
    assert refusal(lambda: caller.write(push_id, rows)).code() is PRECONDITION
    assert refusal(lambda: caller.table(min_epoch=0)).code() is PRECONDITION
    caller.push(rows, absent=[11])
    np.testing.assert_array_equal(caller.table().ids, brute_force(rows, 5, absent=[11]))


def test_a_damaged_payload_is_data_loss_and_not_kept(caller: Caller) -> None:
    rows = random_rows(20, 4)
    push_id = caller.begin(rows).push.push_id
    good, bad = message(push_id, rows[:10], 0), message(push_id, rows[10:], 10)
    bad.crc32c ^= 4
    assert refusal(lambda: caller.stub.WriteRows(iter([good, bad]))).code() is grpc.StatusCode.DATA_LOSS
    state = caller.state(push_id)
    assert [(r.start, r.count) for r in state.stored] == [(0, 10)], "what came before stays"


def test_abort_frees_the_epoch(caller: Caller) -> None:
    rows = random_rows(20, 4)
    push_id = caller.begin(rows).push.push_id
    caller.write(push_id, rows[:10])
    for _ in range(2):
        assert caller.stub.AbortPush(pb.AbortPushRequest(push_id=push_id)).state == pb.PUSH_STATE_ABORTED
    assert refusal(lambda: caller.write(push_id, rows[10:], start=10)).code() is PRECONDITION
    assert caller.push(rows) != push_id
    published = caller.state(caller.table().generation.push_id)
    request = pb.AbortPushRequest(push_id=published.push_id)
    assert refusal(lambda: caller.stub.AbortPush(request)).code() is PRECONDITION


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"run": ""}, "run"),
    ({"run": "../escape"}, "run"),
    ({"run": "UPPER"}, "run"),
    ({"run": "x" * 65}, "run"),
    ({"run": "name\n"}, "run"),
    ({"epoch": -1}, "epoch"),
    ({"num_classes": 1}, "num_classes"),
    ({"num_classes": -5}, "num_classes"),
    ({"num_classes": 2**63 - 1}, "num_classes"),
    ({"num_classes": 2**31}, "num_classes"),
    ({"row_shape": []}, "row_shape"),
    ({"row_shape": [0]}, "row_shape"),
    ({"row_shape": [2, 2]}, "row_shape"),
    ({"row_shape": [-1, -1, 4]}, "row_shape"),
    ({"dtype": pb.DTYPE_UNSPECIFIED}, "dtype"),
    ({"dtype": 77}, "dtype"),
    ({"k": 0}, "k"),
    ({"k": 10}, "k"),
    ({"k": 2**31 - 1}, "k"),
    ({"key": 9}, "key"),
    ({"key": pb.KEY_POOLED}, "key"),
    ({"engine": "no-such-engine"}, "engine"),
    ({"absent": [10]}, "absent"),
    ({"absent": [-1]}, "absent"),
    ({"retention": pb.Retention(keep_embeddings=-1)}, "retention.keep_embeddings"),
    ({"qaconv_candidates": 3}, "qaconv_candidates"),
]


@pytest.mark.parametrize(("changes", "field"), HOSTILE, ids=lambda value: str(value)[:40])
def test_begin_refuses_what_is_out_of_range(caller: Caller, changes: dict[str, Any], field: str) -> None:
    error = refusal(lambda: caller.begin(random_rows(10, 4), **changes))
    assert error.code() is INVALID
    assert bad_field(error) == field
    assert not caller.stub.ListRuns(pb.ListRunsRequest()).runs, "a refused push leaves no run behind"


@pytest.mark.parametrize(
    "changes", [{"row_shape": [2**62]}, {"row_shape": [2**31, 2**31, 2**31]}, {"num_classes": 2**31 - 1}]
)
def test_begin_refuses_sizes_beyond_its_limits(caller: Caller, changes: dict[str, Any]) -> None:
    error = refusal(lambda: caller.begin(random_rows(10, 4), **changes))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "max_" in error.details()


@pytest.mark.parametrize(
    ("start", "size"), [(-1, 16), (10, 16), (0, 0), (0, 15), (9, 32), (2**63 - 1, 16), (-(2**63), 16)]
)
def test_write_refuses_rows_that_are_not_there(caller: Caller, start: int, size: int) -> None:
    push_id = caller.begin(random_rows(10, 4)).push.push_id
    request = pb.WriteRowsRequest(push_id=push_id, row_start=start, payload=bytes(size))
    assert refusal(lambda: caller.stub.WriteRows(iter([request]))).code() is INVALID
    assert caller.state(push_id).rows_stored == 0


def test_write_refuses_streams_that_make_no_sense(caller: Caller) -> None:
    rows = random_rows(10, 4)
    first, second = (caller.begin(rows, epoch=e).push.push_id for e in (0, 1))
    streams: list[list[pb.WriteRowsRequest]] = [
        [],
        [message(first, rows[:2], 0), message(second, rows[:2], 0)],
        [pb.WriteRowsRequest(push_id=first, shared_row_count=3)],
    ]
    for stream in streams:
        assert refusal(partial(caller.stub.WriteRows, iter(stream))).code() is INVALID
    unknown = [message("0" * 24, rows, 0)]
    assert refusal(lambda: caller.stub.WriteRows(iter(unknown))).code() is grpc.StatusCode.NOT_FOUND


def test_a_base_generation_that_is_gone_is_refused_by_name(caller: Caller) -> None:
    error = refusal(lambda: caller.begin(random_rows(10, 4), base_generation=1))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "base_generation" in error.details()


def test_overlapping_writers_never_mix(caller: Caller) -> None:
    """Two writers of the same rows with different bytes: one wins every row that both sent, or is refused."""
    mine, yours = random_rows(300, 16, seed=1), random_rows(300, 16, seed=2)
    push_id = caller.begin(mine, commit_when_complete=False).push.push_id
    outcomes: list[str] = []

    def write(rows: Any) -> None:
        try:
            caller.write(push_id, rows)
            outcomes.append("stored")
        except grpc.RpcError as error:
            outcomes.append(code_of(error).name)

    writers = [threading.Thread(target=write, args=(rows,)) for rows in (mine, yours)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(outcomes) == ["ALREADY_EXISTS", "stored"]
    crcs = [crc32c.crc32c(rows.tobytes()) for rows in (mine, yours)]
    accepted = [crc for crc in crcs if _commits(caller, push_id, crc)]
    assert len(accepted) == 1


def _commits(caller: Caller, push_id: str, crc: int) -> bool:
    try:
        caller.stub.CommitPush(pb.CommitPushRequest(push_id=push_id, rows_crc32c=crc))
    except grpc.RpcError as error:
        return code_of(error) is not grpc.StatusCode.DATA_LOSS
    return True


def test_limits_are_named(start_service: Callable[..., Any]) -> None:
    limits = Limits(max_num_classes=50, max_k=4, max_runs=2, max_open_pushes=3, max_open_pushes_per_run=2)
    caller = start_service(limits=limits).caller()
    rows = random_rows(10, 4)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("max_num_classes", {"num_classes": 51, "k": 3}),
        ("max_k", {"k": 5}),
    ]
    for name, changes in cases:
        error = refusal(partial(caller.begin, rows, **changes))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details().startswith(name)
    caller.begin(rows, run="a", k=1)
    caller.begin(rows, run="a", k=1, epoch=1)
    assert "max_open_pushes_per_run" in refusal(lambda: caller.begin(rows, run="a", k=1, epoch=2)).details()
    caller.begin(rows, run="b", k=1)
    assert "max_runs" in refusal(lambda: caller.begin(rows, run="c", k=1)).details()
    assert "max_open_pushes" in refusal(lambda: caller.begin(rows, run="b", k=1, epoch=1)).details()


def test_a_disk_without_room_refuses_the_push_and_serves_on(start_service: Callable[..., Any]) -> None:
    service = start_service(limits=Limits(min_free_disk_bytes=2**62))
    caller = service.caller()
    error = refusal(lambda: caller.begin(random_rows(10, 4)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "min_free_disk_bytes" in error.details()
    assert caller.stub.GetServerInfo(pb.GetServerInfoRequest()).version


def test_a_push_closes_once_all_rows_are_vouched_for(caller: Caller) -> None:
    rows = random_rows(20, 4)
    push_id = caller.begin(rows, commit_when_complete=False).push.push_id
    caller.write(push_id, rows[:12])
    assert refusal(lambda: caller.vouch(push_id, rows[10:], 10)).code() is PRECONDITION
    assert caller.vouch(push_id, rows[:10]).state == pb.PUSH_STATE_OPEN
    caller.write(push_id, rows[12:], start=12)
    assert refusal(lambda: caller.vouch(push_id, rows[:10], 10)).code() is grpc.StatusCode.DATA_LOSS
    assert caller.state(push_id).state == pb.PUSH_STATE_OPEN
    assert caller.vouch(push_id, rows[10:], 10).state != pb.PUSH_STATE_OPEN
    assert caller.ended(push_id).state == pb.PUSH_STATE_PUBLISHED
    caller.vouch(push_id, rows[3:7], 3)
    error = refusal(lambda: caller.vouch(push_id, rows[3:7], 2))
    assert error.code() is grpc.StatusCode.DATA_LOSS


def test_absent_classes_need_nobody_to_vouch_for_them(caller: Caller) -> None:
    rows = random_rows(20, 4)
    sent = rows.copy()
    sent[3] = np.nan
    push_id = caller.begin(rows, absent=[3], commit_when_complete=False).push.push_id
    caller.write(push_id, sent[:18])
    assert caller.vouch(push_id, sent[:18]).state == pb.PUSH_STATE_OPEN
    caller.begin(rows, absent=[18, 19], commit_when_complete=False)
    assert caller.ended(push_id).state == pb.PUSH_STATE_PUBLISHED
    caller.vouch(push_id, sent[:18])
    np.testing.assert_array_equal(caller.table().ids, brute_force(rows, 5, absent=[3, 18, 19]))


@pytest.mark.parametrize(("start", "count"), [(-1, 3), (18, 3), (2, -1), (2**62, 2**62), (0, 2**63 - 1)])
def test_nobody_vouches_for_rows_that_there_are_not(caller: Caller, start: int, count: int) -> None:
    push_id = caller.begin(random_rows(20, 4), commit_when_complete=False).push.push_id
    request = pb.CommitPushRequest(push_id=push_id, part=pb.RowRange(start=start, count=count))
    error = refusal(lambda: caller.stub.CommitPush(request))
    assert error.code() is INVALID
    assert bad_field(error) == "part"
