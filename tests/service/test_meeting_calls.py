"""Calls that meet: one is held in the middle of its work while another takes away what it needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import crc32c
import grpc
import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_client import NeighbourClient
from nearkin_service.catalogue import Push
from nearkin_service.errors import NotFoundError
from nearkin_service.operations import Pushing, Reading
from nearkin_service.store import DataDirectory, PushFiles
from nearkin_service.values import EmbeddingsState, Generation

from tests.service.conftest import (
    WAIT,
    Caller,
    Service,
    brute_force,
    code_of,
    eventually,
    random_rows,
    refusal,
)

Start = Callable[..., Service]
ROWS = random_rows(40, 8)


class Holding:
    """A method whose first call waits, once begun, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> None:
        method, self.begun, self.let_go = getattr(kind, name), threading.Event(), threading.Event()

        def held(*given: Any, **more: Any) -> Any:
            if not self.begun.is_set():
                self.begun.set()
                assert self.let_go.wait(WAIT)
            return method(*given, **more)

        monkeypatch.setattr(kind, name, held)


@pytest.fixture
def at_once() -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor(4) as pool:
        yield pool.submit


def abort(caller: Caller, push_id: str) -> pb.Push:
    return caller.stub.AbortPush(pb.AbortPushRequest(push_id=push_id), timeout=WAIT)


def delete_run(caller: Caller) -> None:
    caller.stub.DeleteRun(pb.DeleteRunRequest(run="run"), timeout=WAIT)


def compare(caller: Caller) -> None:
    caller.stub.CompareGenerations(pb.CompareGenerationsRequest(run="run"), timeout=WAIT)


def open_files(folder: Path) -> str:
    """Of this process, in this folder."""
    names = []
    for each in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed meanwhile
            names.append(str(each.readlink()))
    return " ".join(name for name in names if name.startswith(str(folder)))


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("take_away", [abort, lambda caller, _: delete_run(caller)], ids=["abort", "delete"])
def test_a_push_that_ends_while_it_is_being_committed(
    caller: Caller,
    at_once: Callable[..., Future[Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    take_away: Callable[[Caller, str], object],
) -> None:
    """Its journal stays open until the commit is in it: the number of a closed file may be another's."""
    noting = Holding(monkeypatch, PushFiles, "note_committed")
    push_id = caller.begin(ROWS, commit_when_complete=False).push.push_id
    caller.write(push_id, ROWS)
    commit = at_once(caller.stub.CommitPush, pb.CommitPushRequest(push_id=push_id), timeout=WAIT)
    assert noting.begun.wait(WAIT)
    take_away(caller, push_id)
    noting.let_go.set()
    with pytest.raises(grpc.RpcError) as ended:
        commit.result()
    assert code_of(ended.value) is grpc.StatusCode.FAILED_PRECONDITION
    assert "aborted" in str(ended.value)
    caller.push(ROWS + 1)
    np.testing.assert_array_equal(caller.table().ids, brute_force(ROWS + 1, 5))
    assert errors(caplog) == []


def test_a_push_that_ends_before_its_rows_are_summed_up(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without rows it has no checksum, and least of all that of the newest generation."""
    caller.push(ROWS)
    push_id = caller.begin(ROWS + 1, 1, commit_when_complete=False).push.push_id
    caller.write(push_id, ROWS + 1)
    complete = Pushing._require_complete

    async def aborted_then(pushing: Pushing, push: Push) -> None:
        await complete(pushing, push)
        await pushing.abort(push.push_id)
        await push.idle()

    monkeypatch.setattr(Pushing, "_require_complete", aborted_then)
    request = pb.CommitPushRequest(push_id=push_id, rows_crc32c=crc32c.crc32c((ROWS + 1).tobytes()))
    refused = refusal(lambda: caller.stub.CommitPush(request, timeout=WAIT))
    assert refused.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_a_push_that_ends_while_somebody_joins_it(
    caller: Caller,
    at_once: Callable[..., Future[Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    push_id = caller.begin(ROWS).push.push_id
    noting = Holding(monkeypatch, PushFiles, "note_absent")
    joined = at_once(caller.begin, ROWS, absent=[3])
    assert noting.begun.wait(WAIT)
    abort(caller, push_id)
    noting.let_go.set()
    assert joined.result().push.state == pb.PUSH_STATE_ABORTED
    caller.push(ROWS + 1)
    assert errors(caplog) == []


def test_rows_that_end_with_their_push_are_not_called_missing(
    caller: Caller, at_once: Callable[..., Future[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    looking = Holding(monkeypatch, Push, "require_complete")
    push_id = caller.begin(ROWS).push.push_id
    written = at_once(caller.write, push_id, ROWS)
    assert looking.begun.wait(WAIT)
    abort(caller, push_id)
    looking.let_go.set()
    with pytest.raises(grpc.RpcError, match="was aborted"):
        written.result()


def test_other_bytes_for_a_push_that_ends_meanwhile(
    caller: Caller,
    at_once: Callable[..., Future[Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They are compared with what was stored, and its journal looked through, although it is gone."""
    push_id = caller.begin(ROWS, commit_when_complete=False).push.push_id
    caller.write(push_id, ROWS)
    comparing = Holding(monkeypatch, PushFiles, "compare")
    written = at_once(caller.write, push_id, ROWS + 1)
    assert comparing.begun.wait(WAIT)
    abort(caller, push_id)
    comparing.let_go.set()
    with pytest.raises(grpc.RpcError, match="other bytes"):
        written.result()
    assert errors(caplog) == []


def test_a_run_that_is_begun_while_it_is_deleted(
    caller: Caller,
    at_once: Callable[..., Future[Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It waits until the old one is gone, and begins a new one."""
    caller.push(ROWS)
    deleting = Holding(monkeypatch, DataDirectory, "delete_run")
    deleted = at_once(delete_run, caller)
    assert deleting.begun.wait(WAIT)
    rows = random_rows(30, 4)
    begun = at_once(caller.begin, rows)
    with pytest.raises(TimeoutError):
        begun.result(0.2)
    deleting.let_go.set()
    deleted.result()
    caller.write(begun.result().push.push_id, rows)
    table = caller.table(min_epoch=0)
    assert table.generation.generation == 1
    np.testing.assert_array_equal(table.ids, brute_force(rows, 5))
    assert errors(caplog) == []


def test_who_waits_for_a_run_that_is_deleted_hears_that_and_not_of_its_pushes(
    start_service: Start, at_once: Callable[..., Future[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if something else wakes them in between."""
    service = start_service()
    caller, counted = service.caller(), service.server.core.metrics.waiting_readers._value.get
    caller.begin(ROWS)
    waiting = at_once(caller.table, min_epoch=0)
    eventually(counted, lambda count: count == 1)
    deleting = Holding(monkeypatch, DataDirectory, "delete_run")
    deleted = at_once(delete_run, caller)
    assert deleting.begun.wait(WAIT)
    caller.begin(ROWS, run="another")
    late = at_once(caller.table, min_epoch=0)
    for each in (waiting, late):
        with pytest.raises(TimeoutError):
            each.result(0.2)
    deleting.let_go.set()
    deleted.result()
    for each in (waiting, late):
        assert refusal(each.result).code() is grpc.StatusCode.NOT_FOUND


def test_nothing_of_a_run_stays_open_that_was_asked_while_it_was_deleted(
    caller: Caller, at_once: Callable[..., Future[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    caller.push(ROWS)
    deleting = Holding(monkeypatch, DataDirectory, "delete_run")
    deleted = at_once(delete_run, caller)
    assert deleting.begun.wait(WAIT)
    caller.nearest([0])
    assert "rows.bin" in open_files(tmp_path)
    deleting.let_go.set()
    deleted.result()
    eventually(lambda: "rows.bin" in open_files(tmp_path), lambda some: not some)


def test_retention_of_a_run_that_is_gone_leaves_the_next_of_its_name_alone(
    start_service: Start, at_once: Callable[..., Future[Any]]
) -> None:
    """Its generations have the numbers that the old one's had; the disk may be far behind."""
    service = start_service()
    caller, core = service.caller(), service.server.core
    busy = threading.Event()
    try:
        for epoch in range(3):
            caller.push(ROWS + epoch, epoch, retention=pb.Retention(keep_embeddings=1, keep_tables=2))
            if epoch == 1:
                eventually(
                    lambda: caller.generation(1).embeddings, lambda s: s == pb.EMBEDDINGS_STATE_DROPPED
                )
                core._background.submit(busy.wait, WAIT)
        eventually(lambda: len(caller.generations()), lambda count: count == 2)  # decided, not done
        delete_run(caller)
        rows = random_rows(50, 4)
        for epoch in range(3):
            caller.push(rows + epoch, epoch, retention=pb.Retention(keep_embeddings=9))
    finally:
        busy.set()
    eventually(lambda: caller.generation(3).embeddings, lambda state: state == pb.EMBEDDINGS_STATE_KEPT)
    for epoch in range(3):
        expected = brute_force(rows + epoch, 5)
        np.testing.assert_array_equal(caller.table(generation=epoch + 1).ids, expected)
        found = caller.nearest(range(50), generation=epoch + 1)
        np.testing.assert_array_equal([row.ids for row in found.rows], expected)


def test_a_generation_that_is_looked_through_when_another_has_its_place(start_service: Start) -> None:
    """The rows of a run made anew are not those that were asked for, and not damaged."""
    service = start_service()
    caller, core = service.caller(), service.server.core
    caller.push(ROWS)
    caller.table(min_epoch=0)
    before = core.catalogue.run("run").generation(1)
    delete_run(caller)
    caller.push(random_rows(50, 4))
    caller.table(min_epoch=0)
    eventually(lambda: caller.generation(1).embeddings, lambda state: state == pb.EMBEDDINGS_STATE_KEPT)
    for look in (core.directory.verify_rows, core.directory.flush):
        with pytest.raises(NotFoundError, match="just removed"):
            look(before)
    with pytest.raises(NotFoundError, match="just removed"), Reading(core).opened(before, scores=True):
        pass
    core.catalogue.replace(replace(before, embeddings=EmbeddingsState.LOST))
    service.stop()
    assert start_service().caller().generation(1).embeddings == pb.EMBEDDINGS_STATE_KEPT


def _joined(caller: Caller) -> None:
    caller.write(caller.begin(ROWS).push.push_id, ROWS)


def _committed_again(caller: Caller) -> None:
    push_id = caller.begin(ROWS).push.push_id
    crc = crc32c.crc32c(ROWS.tobytes())
    caller.stub.CommitPush(pb.CommitPushRequest(push_id=push_id, rows_crc32c=crc), timeout=WAIT)


@pytest.mark.parametrize(
    ("step", "ask"),
    [
        ("map_column", lambda caller: caller.table(generation=1)),
        ("open_rows", lambda caller: caller.nearest([0], generation=1)),
        ("absent", lambda caller: caller.nearest([0], generation=1)),
        ("map_column", compare),
        ("absent", compare),
        ("compare", _joined),
        ("open_rows", _committed_again),
    ],
    ids=["table", "nearest", "nearest, open", "compare", "compare, absent", "joined", "committed again"],
)
def test_nothing_is_answered_from_a_run_made_anew(
    caller: Caller,
    at_once: Callable[..., Future[Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    step: str,
    ask: Callable[[Caller], object],
) -> None:
    """Its files have the very names of those that were about to be opened."""
    for epoch in range(2):
        caller.push(ROWS + epoch, epoch)
    opening = Holding(monkeypatch, DataDirectory, step)
    asked = at_once(ask, caller)
    assert opening.begun.wait(WAIT)
    delete_run(caller)
    for epoch in range(2):
        caller.push(random_rows(50, 4, seed=1), epoch)
    opening.let_go.set()
    assert refusal(asked.result).code() is grpc.StatusCode.NOT_FOUND
    assert errors(caplog) == []


@pytest.mark.parametrize("step", ["open_rows", "verify_rows", "absent"])
def test_a_base_that_goes_while_it_is_read(
    start_service: Start, at_once: Callable[..., Future[Any]], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """As one that was gone before: the client pushes every row."""
    service = start_service()
    caller = service.caller()
    caller.push(ROWS)
    caller.table(min_epoch=0)
    changed = ROWS.copy()
    changed[7] += 1
    reading = Holding(monkeypatch, DataDirectory, step)
    with NeighbourClient(service.server.addresses[0], run="run") as client:
        pushed = at_once(
            client.push, changed, epoch=1, k=5, changed_rows=[7], base_generation=1, timeout=WAIT
        )
        assert reading.begun.wait(WAIT)
        caller.stub.DeleteGeneration(pb.DeleteGenerationRequest(run="run", generation=1), timeout=WAIT)
        reading.let_go.set()
        assert pushed.result().epoch == 1
        np.testing.assert_array_equal(client.table(epoch=1, timeout=WAIT).ids, brute_force(changed, 5))


def test_a_generation_that_goes_while_it_is_pinned_or_asked(
    start_service: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """Its files are gone already, the catalogue has yet to hear of it."""
    service = start_service()
    caller, core = service.caller(), service.server.core
    caller.push(ROWS)
    caller.table(min_epoch=0)
    generation = core.catalogue.run("run").generation(1)
    eventually(lambda: caller.generation(1).embeddings, lambda state: state == pb.EMBEDDINGS_STATE_KEPT)
    core.directory.delete_generation(generation)
    for unpin in (False, True):
        request = pb.PinGenerationRequest(run="run", generation=1, unpin=unpin)
        assert refusal(lambda: caller.stub.PinGeneration(request, timeout=WAIT)).code() is (  # noqa: B023
            grpc.StatusCode.NOT_FOUND
        )
    for question in (lambda: caller.nearest([0]), lambda: caller.table(generation=1)):
        code = refusal(question).code()
        assert code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION)
    assert errors(caplog) == []


def test_rows_that_are_open_can_be_read_whatever_becomes_of_their_name(
    start_service: Start, tmp_path: Path
) -> None:
    service = start_service()
    service.caller().push(ROWS)
    service.caller().table(min_epoch=0)
    directory: DataDirectory = service.server.core.directory
    generation: Generation = service.server.core.catalogue.run("run").generation(1)
    rows = directory.open_rows(generation)
    directory.delete_generation(generation)
    np.testing.assert_array_equal(rows.map(), ROWS)
    rows.close()
