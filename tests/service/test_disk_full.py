"""A disk that is full, at each step of a push: what was published stays, and all works once there is room."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service.config import Limits

from tests.service.conftest import Caller, Service, brute_force, errors_of, eventually, random_rows, refusal

Start = Callable[..., Service]
MIB = 1 << 20
ROWS = random_rows(2000, 512)  # 4 MB
SMALL = random_rows(30, 8)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def caller(disk: Path, start_service: Start) -> Caller:
    caller = start_service(data_dir=disk / "data", limits=Limits(min_free_disk_bytes=0)).caller()
    caller.push(SMALL, run="before")
    return caller


def fill(disk: Path) -> Path:
    """Takes every free byte."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (MIB, 4096):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return filler


def unharmed(caller: Caller) -> None:
    np.testing.assert_array_equal(caller.table(run="before").ids, brute_force(SMALL, 5))


def test_a_push_that_cannot_fit_is_refused_at_once(caller: Caller) -> None:
    error = refusal(lambda: caller.begin(random_rows(20_000, 512)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "min_free_disk_bytes" in str(error.details())
    unharmed(caller)


def test_full_while_rows_arrive(caller: Caller, disk: Path) -> None:
    push_id = caller.begin(ROWS).push.push_id
    caller.write(push_id, ROWS[:100])
    filler = fill(disk)
    error = refusal(lambda: caller.write(push_id, ROWS[100:], start=100, step=100))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error.details()
    unharmed(caller)
    filler.unlink()
    caller.write(push_id, ROWS, step=100)
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(ROWS, 5))


def test_full_when_a_push_begins(caller: Caller, disk: Path) -> None:
    filler = fill(disk)
    for run in ("run", "before"):
        error = refusal(lambda: caller.begin(SMALL, 1, run=run))  # noqa: B023 - called at once
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error.details()
    unharmed(caller)
    filler.unlink()
    caller.push(SMALL, 1)
    unharmed(caller)


def test_full_when_a_table_is_published(caller: Caller, disk: Path) -> None:
    """The push comes to nothing and says so; later builds go on; the epoch can be pushed again."""
    push_id = caller.begin(ROWS, k=1000, commit_when_complete=False).push.push_id
    caller.write(push_id, ROWS, step=100)
    filler = fill(disk)
    refused = None
    try:
        caller.stub.CommitPush(pb.CommitPushRequest(push_id=push_id), timeout=30)
    except grpc.RpcError as error:
        refused = error  # the journal had no room for the commit
    if refused is None:
        ended = caller.ended(push_id)
        assert ended.state == pb.PUSH_STATE_FAILED
        assert "disk" in ended.error
    unharmed(caller)
    filler.unlink()
    if caller.state(push_id).state == pb.PUSH_STATE_OPEN:
        caller.stub.AbortPush(pb.AbortPushRequest(push_id=push_id), timeout=30)
    caller.push(SMALL, 5, run="another")
    caller.push(SMALL, 0)
    np.testing.assert_array_equal(caller.table().ids, brute_force(SMALL, 5))
    assert not list((disk / "data/runs/run/generations").glob(".aside*"))


def test_a_restart_on_a_full_disk_serves_what_is_there(start_service: Start, disk: Path) -> None:
    limits = Limits(min_free_disk_bytes=0)
    first = start_service(data_dir=disk / "data", limits=limits)
    first.caller().push(SMALL, run="before")
    first.caller().write(first.caller().begin(ROWS).push.push_id, ROWS[:100])
    fill(disk)
    first.stop()
    second = start_service(data_dir=disk / "data", limits=limits)
    unharmed(second.caller())
    assert eventually(lambda: second.caller().generation(run="before").generation, bool) == 1


def used(disk: Path) -> int:
    """Bytes of the file system that are taken, but for the filler's."""
    filler = disk / "filler"
    return shutil.disk_usage(disk).used - (filler.stat().st_blocks * 512 if filler.exists() else 0)


def test_a_push_that_ends_on_a_full_disk_frees_its_rows_and_stays_ended(
    start_service: Start, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = start_service(data_dir=disk / "data", limits=Limits(min_free_disk_bytes=0))
    caller = service.caller()
    caller.push(SMALL, run="before")
    before = used(disk)
    push_id = caller.begin(ROWS).push.push_id
    caller.write(push_id, ROWS[:1999], step=100)
    fill(disk)
    assert used(disk) > before + 3 * MIB
    aborted = caller.stub.AbortPush(pb.AbortPushRequest(push_id=push_id), timeout=30)
    assert aborted.state == pb.PUSH_STATE_ABORTED
    eventually(lambda: used(disk), lambda now: now < before + MIB)
    service.stop()
    again = start_service(data_dir=disk / "data", limits=Limits(min_free_disk_bytes=0)).caller()
    assert not list(again.stub.GetRun(pb.GetRunRequest(run="run"), timeout=30).pushes)
    unharmed(again)
    assert not errors_of(caplog)


def test_a_start_on_a_full_disk_sets_no_ended_push_aside(start_service: Start, disk: Path) -> None:
    service = start_service(data_dir=disk / "data", limits=Limits(min_free_disk_bytes=0))
    caller = service.caller()
    push_id = caller.begin(SMALL).push.push_id
    caller.stub.AbortPush(pb.AbortPushRequest(push_id=push_id), timeout=30)
    service.stop()
    fill(disk)
    again = start_service(data_dir=disk / "data", limits=Limits(min_free_disk_bytes=0))
    assert again.caller().state(push_id).state == pb.PUSH_STATE_ABORTED
    assert not list((disk / "data/quarantine").iterdir())


def test_what_could_not_begin_on_a_full_disk_leaves_nothing(
    start_service: Start, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither rows that lie in the way of others until the next start, nor a run that nobody has made."""
    service = start_service(data_dir=disk / "data", limits=Limits(min_free_disk_bytes=0))
    caller = service.caller()
    for epoch in range(2):  # the second one's retention leaves the first one's file as a spare
        caller.push(ROWS, epoch, retention=pb.Retention(keep_embeddings=1))
    eventually(lambda: caller.generation(1).embeddings, lambda s: s == pb.EMBEDDINGS_STATE_DROPPED)
    eventually(lambda: list((disk / "data/spares").iterdir()), lambda found: len(found) == 1)
    pushes = disk / "data/runs/run/pushes"
    eventually(lambda: list(pushes.iterdir()), lambda found: not found)
    for run in ("run", "new"):
        for _ in range(3):
            filler = fill(disk)
            error = refusal(lambda: caller.begin(ROWS, 2, run=run))  # noqa: B023 - called at once
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error.details()
    assert not list(pushes.iterdir())
    assert [path.name for path in (disk / "data/runs").iterdir()] == ["run"]
    service.stop()
    filler.unlink()
    again = start_service(data_dir=disk / "data", limits=Limits(min_free_disk_bytes=0)).caller()
    listed = again.stub.ListRuns(pb.ListRunsRequest(), timeout=30)
    assert [run.run for run in listed.runs] == ["run"]
    assert not errors_of(caplog)


def test_retention_makes_room_on_a_full_disk(
    start_service: Start, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = start_service(data_dir=disk / "data", limits=Limits(min_free_disk_bytes=0))
    caller = service.caller()
    caller.push(SMALL, run="before")
    first = random_rows(2000, 512, seed=1)
    caller.push(first)
    eventually(lambda: caller.generation(1).embeddings, lambda s: s == pb.EMBEDDINGS_STATE_KEPT)
    sweeping = service.server.core.directory.drop_embeddings

    def fill_before(generation: Any) -> Any:
        fill(disk)
        return sweeping(generation)

    with mock.patch.object(service.server.core.directory, "drop_embeddings", fill_before):
        caller.push(ROWS, 1, retention=pb.Retention(keep_embeddings=1))
        rows = disk / "data/runs/run/generations/1/rows.bin"
        eventually(rows.exists, lambda there: not there)
    unharmed(caller)
    np.testing.assert_array_equal(caller.table(generation=1).ids, brute_force(first, 5))
    service.stop()
    again = start_service(data_dir=disk / "data", limits=Limits(min_free_disk_bytes=0)).caller()
    assert again.generation(1).embeddings == pb.EMBEDDINGS_STATE_DROPPED
    assert not errors_of(caplog)


def test_a_pin_that_the_disk_does_not_have_is_none(start_service: Start, tmp_path: Path) -> None:
    service = start_service()
    caller = service.caller()
    caller.push(SMALL)
    pin = partial(caller.stub.PinGeneration, pb.PinGenerationRequest(run="run", generation=1), timeout=30)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(service.server.core.directory, "pin", side_effect=full):
        assert refusal(pin).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not caller.generation(1).pinned
    assert pin().pinned


def test_a_build_that_finds_the_disk_full_is_no_error_of_the_service(
    caller: Caller, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    push_id = caller.begin(ROWS, k=1000, commit_when_complete=False).push.push_id
    caller.write(push_id, ROWS, step=100)
    filler = fill(disk)
    filler.write_bytes(bytes(filler.stat().st_size - 2 * MIB))  # room for the commit, not for the table
    caller.stub.CommitPush(pb.CommitPushRequest(push_id=push_id), timeout=30)
    assert "min_free_disk_bytes" in caller.ended(push_id).error
    assert not errors_of(caplog)


def test_a_journal_that_had_room_for_half_is_said_to_be_a_full_disk(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_id = caller.begin(SMALL).push.push_id
    real = os.write

    def half(descriptor: int, data: bytes) -> int:
        """What a disk with room for half of it does: takes that, and nothing then."""
        if not Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith("journal"):
            return real(descriptor, data)
        if len(data) % 32:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[:20])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", half)
        error = refusal(lambda: caller.write(push_id, SMALL))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error.details()
    caller.write(push_id, SMALL)
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(SMALL, 5))
