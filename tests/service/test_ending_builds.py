"""Real builds stop when their push is aborted or their time is up, and leave nothing behind."""

from __future__ import annotations

import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb

from tests.service.conftest import Caller, brute_force, eventually, random_rows
from tests.service.engines.test_exact import ENGINES

ROWS = random_rows(30_000, 64)
EVERY = [*ENGINES, "ivf"]


@pytest.mark.parametrize("engine", EVERY)
def test_a_build_that_takes_too_long_fails_its_push(caller: Caller, engine: str) -> None:
    begun = caller.begin(ROWS, k=32, engine=engine, build_timeout={"nanos": 50_000_000})
    caller.write(begun.push.push_id, ROWS, step=10_000)
    ended = caller.ended(begun.push.push_id)
    assert ended.state == pb.PUSH_STATE_FAILED
    assert "build_timeout" in ended.error


@pytest.mark.parametrize("engine", EVERY)
def test_an_aborted_build_makes_room_for_the_next(caller: Caller, engine: str) -> None:
    begun = caller.begin(ROWS, k=32, engine=engine)
    caller.write(begun.push.push_id, ROWS, step=10_000)
    building = (pb.PUSH_STATE_BUILDING, pb.PUSH_STATE_PUBLISHED)
    eventually(lambda: caller.state(begun.push.push_id).state, lambda state: state in building)
    if caller.state(begun.push.push_id).state == pb.PUSH_STATE_PUBLISHED:
        pytest.skip("this machine had built it before it could be aborted")
    caller.stub.AbortPush(pb.AbortPushRequest(push_id=begun.push.push_id))
    assert caller.ended(begun.push.push_id).state == pb.PUSH_STATE_ABORTED
    small = ROWS[:300].copy()
    caller.push(small, engine="flat")
    assert caller.table().generation.generation == 1
    np.testing.assert_array_equal(caller.table().ids, brute_force(small, 5))
