"""A flipped bit in the data directory, between a row's arrival and its table, never reaches the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nearkin.v1 import neighbours_pb2 as pb

from tests.service.conftest import Caller, Service, brute_force, random_rows, refusal
from tests.service.test_tables import HeldEngines

ROWS = random_rows(60, 8)


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


@pytest.fixture
def released() -> Iterator[HeldEngines]:
    held = HeldEngines()
    yield held
    held.go.set()


def damaged_while_building(caller: Caller, engines: HeldEngines, tmp_path: Path) -> str:
    """A push one bit of whose rows flips while its engine is at work; its id."""
    push_id: str = caller.begin(ROWS).push.push_id
    caller.write(push_id, ROWS)
    assert engines.building.wait(10)
    flip(tmp_path / "data/runs/run/pushes" / push_id / "rows.bin", 1000)
    return push_id


def refused(caller: Caller, push_id: str) -> None:
    """The push has failed as DATA_LOSS, nothing was published, and the epoch can be pushed again."""
    push = caller.ended(push_id)
    assert push.state == pb.PUSH_STATE_FAILED
    assert push.error.startswith("DATA_LOSS: ")
    assert caller.generations(push.run) == []
    waiting = refusal(lambda: caller.table(run=push.run, min_epoch=0))
    assert "DATA_LOSS" in (waiting.details() or "")
    caller.push(ROWS, run=push.run)
    np.testing.assert_array_equal(caller.table(run=push.run).ids, brute_force(ROWS, 5))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bit=st.integers(0, ROWS.nbytes * 8 - 1))
def test_a_bit_of_the_rows_flipped_after_they_arrived(caller: Caller, tmp_path: Path, bit: int) -> None:
    push_id = caller.begin(ROWS, run=f"bit-{bit}", commit_when_complete=False).push.push_id
    caller.write(push_id, ROWS, step=7)
    flip(tmp_path / f"data/runs/bit-{bit}/pushes" / push_id / "rows.bin", bit)
    caller.stub.CommitPush(pb.CommitPushRequest(push_id=push_id))
    assert caller.ended(push_id).state == pb.PUSH_STATE_FAILED
    assert f"rows {bit // 256 // 7 * 7}.." in caller.state(push_id).error
    refused(caller, push_id)
    caller.stub.DeleteRun(pb.DeleteRunRequest(run=f"bit-{bit}"))


def test_a_bit_of_their_checksums(caller: Caller, tmp_path: Path) -> None:
    push_id = caller.begin(ROWS, commit_when_complete=False).push.push_id
    caller.write(push_id, ROWS, step=7)
    flip(tmp_path / "data/runs/run/pushes" / push_id / "journal", 3 * 32 * 8 + 40)
    caller.stub.CommitPush(pb.CommitPushRequest(push_id=push_id))
    refused(caller, push_id)


def test_a_bit_flipped_while_the_table_is_built(
    released: HeldEngines, start_service: Callable[..., Service], tmp_path: Path
) -> None:
    caller = start_service(using=released).caller()
    push_id = damaged_while_building(caller, released, tmp_path)
    released.go.set()
    refused(caller, push_id)


def test_an_engine_that_stumbles_over_damage_is_not_blamed(
    released: HeldEngines, start_service: Callable[..., Service], tmp_path: Path
) -> None:
    caller = start_service(using=released).caller()
    push_id = damaged_while_building(caller, released, tmp_path)
    released.error = RuntimeError("no certificate for row 3")
    released.go.set()
    assert caller.ended(push_id).error.startswith("DATA_LOSS: ")


def test_absent_rows_may_lie_there_as_they_like(caller: Caller, tmp_path: Path) -> None:
    push_id = caller.begin(ROWS, absent=[59], commit_when_complete=False).push.push_id
    caller.write(push_id, ROWS[:59], step=7)
    flip(tmp_path / "data/runs/run/pushes" / push_id / "rows.bin", 59 * 256)
    caller.stub.CommitPush(pb.CommitPushRequest(push_id=push_id))
    assert (caller.table(min_epoch=0).ids[59] == -1).all()
