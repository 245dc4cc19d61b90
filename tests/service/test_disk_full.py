"""A disk that is full, at each step of a push: what was published stays, and all works once there is room."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service.config import Limits

from tests.service.conftest import Caller, Service, brute_force, eventually, random_rows, refusal

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
    with filler.open("wb", buffering=0) as file:
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
