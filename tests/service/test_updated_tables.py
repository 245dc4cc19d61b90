"""A build that starts from an earlier generation publishes the same bytes as one that does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from numpy.typing import NDArray

from tests.service.conftest import Caller, Service, Table, random_rows

ROWS = random_rows(600, 24)


def with_changes(rows: NDArray[Any], *changed: int, seed: int = 1) -> NDArray[Any]:
    after = rows.copy()
    after[list(changed)] = random_rows(len(changed), *rows.shape[1:], seed=seed).astype(rows.dtype)
    return after


def built_in_full(caller: Caller, rows: NDArray[Any], **changes: Any) -> Table:
    """The table of a run that has no other generation."""
    caller.push(rows, run="alone", **changes)
    table = caller.table(run="alone")
    assert "update" not in table.generation.stage_seconds
    return table


def assert_same(updated: Table, full: Table) -> None:
    assert updated.ids.tobytes() == full.ids.tobytes()
    assert updated.scores is not None
    assert full.scores is not None
    assert updated.scores.tobytes() == full.scores.tobytes()
    assert updated.generation.engine == full.generation.engine


@pytest.mark.parametrize("engine", ["flat", "auto"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_few_changed_rows_mean_an_update(caller: Caller, engine: str, dtype: Any) -> None:
    before = ROWS.astype(dtype)
    after = with_changes(before, 3, 4, 599)
    caller.push(before, 0, engine=engine, absent=[7, 8])
    caller.push(after, 1, engine=engine, absent=[8, 9])
    updated = caller.table(min_epoch=1)
    assert "update" in updated.generation.stage_seconds
    assert updated.generation.recomputed_rows < 300
    assert_same(updated, built_in_full(caller, after, engine=engine, absent=[8, 9]))


def test_rows_taken_from_a_base_are_updated_from_it(caller: Caller) -> None:
    """The base is not the newest generation; the newest is nothing like it."""
    caller.push(ROWS, 0)
    caller.push(random_rows(600, 24, seed=9), 1)
    after = with_changes(ROWS, 100)
    push_id = caller.begin(after, 2, base_generation=1, commit_when_complete=False).push.push_id
    caller.write(push_id, after[100:101], start=100)
    caller.stub.CommitPush(pb.CommitPushRequest(push_id=push_id))
    updated = caller.table(min_epoch=2)
    assert "update" in updated.generation.stage_seconds
    assert updated.generation.base_generation == 1
    assert_same(updated, built_in_full(caller, after))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"k": 6}),
        ({"engine": "ivf"}, {}),
        ({}, {"engine": "ivf"}),
        ({"key": pb.KEY_QACONV}, {"key": pb.KEY_QACONV}),
        ({"key": pb.KEY_POOLED}, {}),
        ({"retention": pb.Retention(keep_embeddings=1)}, {"num_classes": 599}),
    ],
    ids=str,
)
def test_what_does_not_fit_is_built_in_full(
    caller: Caller, first: dict[str, Any], second: dict[str, Any]
) -> None:
    maps = ROWS.reshape(600, 6, 2, 2)
    caller.push(maps, 0, **first)
    rows = maps[: second.get("num_classes", 600)]
    caller.push(rows, 1, **second)
    table = caller.table(min_epoch=1)
    assert table.generation.generation == 2
    assert_same(table, built_in_full(caller, rows, **second))
    assert "update" not in table.generation.stage_seconds


def test_when_everything_changed_the_build_is_a_full_one(caller: Caller) -> None:
    caller.push(ROWS, 0)
    caller.push(random_rows(600, 24, seed=5), 1)
    assert "update" not in caller.table(min_epoch=1).generation.stage_seconds


@pytest.mark.parametrize("file", ["ids.bin", "rows.bin"])
def test_damage_to_the_parent_does_not_reach_its_child(
    start_service: Callable[..., Service], tmp_path: Path, file: str
) -> None:
    caller = start_service().caller()
    caller.push(ROWS, 0)
    path = tmp_path / "data/runs/run/generations/1" / file
    data = bytearray(path.read_bytes())
    data[37] ^= 8
    path.write_bytes(data)
    after = with_changes(ROWS, 11)
    caller.push(after, 1)
    assert_same(caller.table(min_epoch=1), built_in_full(caller, after))
