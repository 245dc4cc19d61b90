"""A build that starts from an earlier generation publishes the same bytes as one that does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service.engines import loading, ways
from nearkin_service.store.atomic import read_document, write_document
from numpy.typing import NDArray

from tests.service.conftest import Caller, Service, Table, eventually, random_rows

ROWS = random_rows(600, 24)
FIRST = "data/runs/run/generations/1"


@pytest.fixture(autouse=True, scope="module")
def _loops() -> None:
    """`auto` chooses the same all along: until loops are loaded it builds small tables by `flat`."""
    loading.wait(ways.Job(len(ROWS), ROWS.shape[1], 5))


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


@pytest.fixture
def with_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tables hold a reserve too."""
    monkeypatch.setattr(ways, "AT_ONCE", 0)


def leave(path: Path) -> None:
    pass


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def forget(path: Path) -> None:
    """As a version left it that held no reserves."""
    path.unlink()
    manifest = path.with_name("manifest.json")
    body = read_document(manifest)
    del body["reserve"]
    write_document(manifest, body)


@pytest.mark.usefixtures("with_reserves")
@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("do", [leave, flip, cut, Path.unlink, forget])
def test_a_reserve_may_be_gone_or_damaged(
    start_service: Callable[..., Service],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    do: Callable[[Path], None],
    restarted: bool,
) -> None:
    service = start_service()
    caller = service.caller()
    caller.push(ROWS, 0, k=16, engine="flat")
    path = tmp_path / FIRST / "reserve.bin"
    assert path.stat().st_size == 600 * 4 * 8
    assert "reserve" not in read_document(path.with_name("manifest.json"))["generation"]
    if restarted:
        service.stop()
    do(path)
    caller = start_service().caller() if restarted else caller
    rows = ROWS
    for epoch in (1, 2):
        rows = with_changes(rows, *range(epoch, 600, 60), seed=epoch)
        caller.push(rows, epoch, k=16, engine="flat")
        updated = caller.table(min_epoch=epoch)
        assert "update" in updated.generation.stage_seconds
        if epoch == 1:
            assert (updated.generation.recomputed_rows < 40) == (do is leave)
    warned = "updated without its reserve" in caplog.text
    assert warned == (do in (flip, cut, Path.unlink) or (do is forget and not restarted))
    assert_same(updated, built_in_full(caller, rows, k=16, engine="flat"))


@pytest.mark.usefixtures("with_reserves")
def test_a_reserve_goes_with_the_embeddings(caller: Caller, tmp_path: Path) -> None:
    for epoch in range(3):
        caller.push(with_changes(ROWS, epoch), epoch, k=16)
    path = tmp_path / FIRST
    eventually((path / "reserve.bin").exists, lambda there: not there)
    assert not (path / "rows.bin").exists()
    assert (path.with_name("2") / "reserve.bin").exists()
    assert caller.table(generation=1).ids.shape == (600, 16)
