"""Every status code that the protocol's comments promise is really returned, over a real socket."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import nearkin.v1
import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service.config import Limits

from tests.service.conftest import Caller, Service, eventually, message, random_rows, refusal

Start = Callable[..., Service]
PROTO = Path(nearkin.v1.__file__).with_name("neighbours.proto")
ROWS = random_rows(10, 4)

NOT_YET = {("BeginPush", "UNIMPLEMENTED")}
"""This version has every key and `base_generation`; the code is for clients that meet an older service."""


def documented() -> set[tuple[str, str]]:
    """(method, code) for every code named in the comment above a method."""
    lines = re.findall(r"((?:^  //.*\n)+)  rpc (\w+)", PROTO.read_text(), re.MULTILINE)
    return {
        (method, code) for comment, method in lines for code in re.findall(r"([A-Z]+(?:_[A-Z]+)*):", comment)
    }


def begun(caller: Caller, rows: Any = ROWS, **changes: Any) -> str:
    return caller.begin(rows, **{"commit_when_complete": False} | changes).push.push_id


def aborted(caller: Caller) -> str:
    push_id = begun(caller)
    caller.stub.AbortPush(pb.AbortPushRequest(push_id=push_id))
    return push_id


def commit(caller: Caller, push_id: str, crc: int | None = None) -> pb.Push:
    return caller.stub.CommitPush(pb.CommitPushRequest(push_id=push_id, rows_crc32c=crc))


def committed_with_zero_row(caller: Caller) -> pb.Push:
    push_id = begun(caller)
    caller.write(push_id, np.zeros((10, 4), np.float32))
    return commit(caller, push_id)


def committed_with_wrong_checksum(caller: Caller) -> pb.Push:
    push_id = begun(caller)
    caller.write(push_id, ROWS)
    return commit(caller, push_id, 1)


def conflicting(caller: Caller) -> pb.WriteRowsResponse:
    push_id = begun(caller)
    caller.write(push_id, ROWS)
    return caller.write(push_id, ROWS + 1)


def damaged(caller: Caller) -> pb.WriteRowsResponse:
    sent = message(begun(caller), ROWS, 0)
    sent.crc32c ^= 1
    return caller.stub.WriteRows(iter([sent]))


def with_nan(caller: Caller) -> pb.WriteRowsResponse:
    return caller.write(begun(caller), np.full((10, 4), np.nan, np.float32))


def joined_with_other_arguments(caller: Caller) -> pb.BeginPushResponse:
    begun(caller, k=3)
    return caller.begin(ROWS, k=4)


def published_and_aborted(caller: Caller) -> pb.Push:
    return caller.stub.AbortPush(pb.AbortPushRequest(push_id=caller.push(ROWS)))


def awaited_after_abort(caller: Caller) -> Any:
    aborted(caller)
    return caller.table(min_epoch=0)


def read_too_far(caller: Caller) -> Any:
    caller.push(ROWS)
    return caller.table(row_start=10)


def awaited_in_vain(caller: Caller) -> Any:
    return list(caller.stub.ReadTable(pb.ReadTableRequest(run="run", min_epoch=0), timeout=0.2))


def asked_beyond_k(caller: Caller) -> Any:
    caller.push(ROWS)
    return caller.nearest([1], k=10)


def asked_after_retention(caller: Caller) -> Any:
    for epoch in range(2):
        caller.push(ROWS, epoch, retention=pb.Retention(keep_embeddings=1))
    eventually(lambda: caller.generation(1).embeddings, lambda s: s == pb.EMBEDDINGS_STATE_DROPPED)
    return caller.nearest([1], generation=1)


def compared_with_other_size(caller: Caller) -> Any:
    caller.push(ROWS)
    caller.push(ROWS[:9].copy(), epoch=1)
    return caller.stub.CompareGenerations(pb.CompareGenerationsRequest(run="run"))


def generation_of(caller: Caller) -> Any:
    return caller.generation(1)


CASES: dict[tuple[str, str], Callable[[Caller], Any]] = {
    ("BeginPush", "INVALID_ARGUMENT"): lambda c: c.begin(ROWS, k=0),
    ("BeginPush", "ALREADY_EXISTS"): joined_with_other_arguments,
    ("BeginPush", "FAILED_PRECONDITION"): lambda c: c.begin(ROWS, base_generation=1),
    ("WriteRows", "INVALID_ARGUMENT"): with_nan,
    ("WriteRows", "NOT_FOUND"): lambda c: c.write("f" * 24, ROWS),
    ("WriteRows", "DATA_LOSS"): damaged,
    ("WriteRows", "ALREADY_EXISTS"): conflicting,
    ("WriteRows", "FAILED_PRECONDITION"): lambda c: c.write(aborted(c), ROWS),
    ("GetPush", "NOT_FOUND"): lambda c: c.state("f" * 24),
    ("CommitPush", "INVALID_ARGUMENT"): committed_with_zero_row,
    ("CommitPush", "FAILED_PRECONDITION"): lambda c: commit(c, begun(c)),
    ("CommitPush", "DATA_LOSS"): committed_with_wrong_checksum,
    ("CommitPush", "NOT_FOUND"): lambda c: commit(c, "f" * 24),
    ("AbortPush", "FAILED_PRECONDITION"): published_and_aborted,
    ("AbortPush", "NOT_FOUND"): lambda c: c.stub.AbortPush(pb.AbortPushRequest(push_id="f" * 24)),
    ("ReadTable", "NOT_FOUND"): lambda c: c.table(),
    ("ReadTable", "INVALID_ARGUMENT"): read_too_far,
    ("ReadTable", "FAILED_PRECONDITION"): awaited_after_abort,
    ("ReadTable", "DEADLINE_EXCEEDED"): awaited_in_vain,
    ("Nearest", "NOT_FOUND"): lambda c: c.nearest([1]),
    ("Nearest", "INVALID_ARGUMENT"): asked_beyond_k,
    ("Nearest", "FAILED_PRECONDITION"): asked_after_retention,
    ("GetRun", "NOT_FOUND"): lambda c: c.stub.GetRun(pb.GetRunRequest(run="run")),
    ("ListGenerations", "NOT_FOUND"): lambda c: c.generations(),
    ("GetGeneration", "NOT_FOUND"): generation_of,
    ("DeleteRun", "NOT_FOUND"): lambda c: c.stub.DeleteRun(pb.DeleteRunRequest(run="run")),
    ("DeleteGeneration", "NOT_FOUND"): lambda c: c.stub.DeleteGeneration(
        pb.DeleteGenerationRequest(run="run", generation=1)
    ),
    ("PinGeneration", "NOT_FOUND"): lambda c: c.stub.PinGeneration(pb.PinGenerationRequest(run="run")),
    ("CompareGenerations", "NOT_FOUND"): lambda c: c.stub.CompareGenerations(
        pb.CompareGenerationsRequest(run="run")
    ),
    ("CompareGenerations", "FAILED_PRECONDITION"): compared_with_other_size,
}
ELSEWHERE = {("Nearest", "DATA_LOSS")}


def test_every_documented_code_has_its_case() -> None:
    assert documented() - NOT_YET == set(CASES) | ELSEWHERE


@pytest.mark.parametrize(("method", "code"), CASES, ids="-".join)
def test_documented_codes(caller: Caller, method: str, code: str) -> None:
    error = refusal(lambda: CASES[method, code](caller))
    assert error.code().name == code, error.details()
    assert error.details()


def with_part(caller: Caller, start: int, count: int) -> pb.Push:
    part = pb.RowRange(start=start, count=count)
    return caller.stub.CommitPush(pb.CommitPushRequest(push_id=begun(caller), part=part))


def compared(caller: Caller, **numbers: int) -> Any:
    return caller.stub.CompareGenerations(pb.CompareGenerationsRequest(run="run", **numbers))


@pytest.mark.parametrize(
    ("call", "field", "value"),
    [
        (lambda c: compared(c, generation=-7), "generation", "-7"),
        (lambda c: compared(c, base_generation=-7), "base_generation", "-7"),
        (lambda c: with_part(c, 4, 8), "part", "8 rows from row 4 on"),
        (lambda c: with_part(c, 4, -8), "part", "-8 rows from row 4 on"),
        (lambda c: begun(c, qaconv_weights=[1.0]), "qaconv_weights", "'flat'"),
        (lambda c: begun(c, accept_shared_memory=True, row_start=9, row_count=2), "row_start", "row 9"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(
    caller: Caller, call: Callable[[Caller], Any], field: str, value: str
) -> None:
    error = refusal(lambda: call(caller))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(error.details()).startswith(f"{field}: ")
    assert value in str(error.details())


def test_nearest_data_loss(start_service: Start, tmp_path: Path) -> None:
    """A row that was damaged while the service was down: the table is served, queries say what happened."""
    first = start_service()
    first.caller().push(ROWS)
    first.stop()
    rows = tmp_path / "data/runs/run/generations/1/rows.bin"
    data = bytearray(rows.read_bytes())
    data[37] ^= 8
    rows.write_bytes(data)
    caller = start_service().caller()
    assert len(caller.table().ids) == 10
    for _ in range(2):
        assert refusal(lambda: caller.nearest([1])).code() is grpc.StatusCode.DATA_LOSS
    assert caller.generation().embeddings == pb.EMBEDDINGS_STATE_LOST


@pytest.mark.parametrize(
    "method", [m.name for m in pb.DESCRIPTOR.services_by_name["NeighbourService"].methods]
)
def test_bytes_that_are_no_message_are_an_invalid_argument(caller: Caller, method: str) -> None:
    path, raw = f"/nearkin.v1.NeighbourService/{method}", b"\x0a\xff\xff\xff\xff\x7f"
    channel: Any = caller.channel
    if method == "WriteRows":
        error = refusal(lambda: channel.stream_unary(path)(iter([raw]), timeout=10))
    elif method in ("ReadTable", "WatchRun"):
        error = refusal(lambda: list(channel.unary_stream(path)(raw, timeout=10)))
    else:
        error = refusal(lambda: channel.unary_unary(path)(raw, timeout=10))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_messages_beyond_the_limit_are_refused(start_service: Start) -> None:
    limits = Limits(max_message_bytes=1 << 20, max_row_bytes=1 << 16)
    caller = start_service(limits=limits, chunk_bytes=1 << 18).caller()
    rows = random_rows(2000, 256)
    response = caller.begin(rows)
    assert (response.chunk_bytes, response.max_message_bytes) == (1 << 18, 1 << 20)
    error = refusal(lambda: caller.write(response.push.push_id, rows))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caller.write(response.push.push_id, rows, step=256).complete
