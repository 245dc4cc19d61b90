"""Rows in, tables out, over real sockets and a real service, against float64 brute force."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from nearkin.v1.checksums import crc32c
from nearkin_client import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NearkinError,
    NeighbourClient,
    NotFound,
    NotReadyInTime,
    PushFailed,
    Retention,
    RunSnapshot,
)
from nearkin_client.arrays import WIRE_DTYPES
from nearkin_client.local import LocalService

from tests.client.oracle import assert_is_table, similarities
from tests.client.ranks import push_and_fetch

generator = np.random.default_rng(3)


def maps(count: int, *shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return generator.standard_normal((count, *shape)).astype(np.float32)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("given", ["numpy", "torch"])
@pytest.mark.parametrize("shape", [(16,), (3, 4, 2)])
def test_a_table_is_that_of_the_rows_as_sent(
    nearkin: NeighbourClient, dtype: str, given: str, shape: tuple[int, ...]
) -> None:
    rows = maps(50, *shape)
    as_sent = rows.astype(WIRE_DTYPES[dtype])
    values = torch.from_numpy(rows).to(getattr(torch, dtype)) if given == "torch" else as_sent
    push = nearkin.push(values, epoch=0, k=7)
    assert push.rows_stored == push.num_classes == 50
    table = nearkin.table(epoch=0, timeout=30)
    assert table.ids.dtype == np.int32
    assert table.ids.shape == (50, 7)
    assert table.scores is not None
    assert table.scores.dtype == np.float32
    assert_is_table(table.ids, table.scores, similarities(as_sent.astype(np.float64)))
    generation = nearkin.generation(table.generation)
    assert (generation.dtype, generation.row_shape, generation.epoch) == (dtype, shape, 0)


@pytest.mark.parametrize("wire_dtype", ["float16", "bfloat16"])
def test_wire_dtype_converts_before_sending(nearkin: NeighbourClient, wire_dtype: Any) -> None:
    rows = maps(40, 12)
    nearkin.push(rows, epoch=0, k=5, wire_dtype=wire_dtype)
    table = nearkin.table(epoch=0, timeout=30)
    assert table.scores is not None
    as_sent = rows.astype(WIRE_DTYPES[wire_dtype]).astype(np.float64)
    assert_is_table(table.ids, table.scores, similarities(as_sent))
    assert nearkin.generation().dtype == wire_dtype


def test_key_pooled_compares_means(nearkin: NeighbourClient) -> None:
    rows = maps(40, 6, 3, 2)
    nearkin.push(rows, epoch=0, k=5, key="pooled")
    table = nearkin.table(epoch=0, timeout=30)
    assert table.scores is not None
    assert_is_table(table.ids, table.scores, similarities(rows, "pooled"))
    assert nearkin.generation().key == "pooled"


@pytest.mark.parametrize(("count", "k"), [(2, 1), (9, 8)])
def test_smallest_and_fullest_tables(nearkin: NeighbourClient, count: int, k: int) -> None:
    rows = maps(count, 1) if count == 2 else maps(count, 5)
    nearkin.push(rows, epoch=0, k=k)
    table = nearkin.table(epoch=0, timeout=30)
    assert all(sorted([row, *ids]) == list(range(count)) for row, ids in enumerate(table.ids.tolist()))


def test_twins_keep_each_other_and_ties_go_by_id(nearkin: NeighbourClient) -> None:
    rows = np.repeat(maps(1, 8), 6, axis=0)
    nearkin.push(rows, epoch=0, k=3)
    ids = nearkin.table(epoch=0, timeout=30).ids
    assert ids.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]


def test_absent_rows_are_nobodys_neighbours(nearkin: NeighbourClient) -> None:
    rows = maps(12, 6)
    rows[[2, 7]] = 0
    nearkin.push(rows, epoch=0, k=4, absent=[7, 2])
    table = nearkin.table(epoch=0, timeout=30)
    assert table.scores is not None
    assert (table.ids[[2, 7]] == -1).all()
    assert np.isneginf(table.scores[[2, 7]]).all()
    present = np.setdiff1d(np.arange(12), [2, 7])
    assert not np.isin(table.ids[present], [2, 7]).any()
    assert nearkin.generation().absent_count == 2


# ------------------------------------------------------------------------------------------ many ranks


def test_ranks_in_threads_push_in_any_order_and_twice(nearkin: NeighbourClient) -> None:
    rows = maps(90, 10)
    shards = [(lo, lo + 15) for lo in range(0, 90, 15)] * 2
    random.Random(5).shuffle(shards)

    def push(shard: tuple[int, int]) -> None:
        lo, hi = shard
        nearkin.push(rows[lo:hi], epoch=4, row_start=lo, num_classes=90, k=6)

    with ThreadPoolExecutor(4) as ranks:
        list(ranks.map(push, shards))
    table = nearkin.table(epoch=4, timeout=30)
    assert table.scores is not None
    assert_is_table(table.ids, table.scores, similarities(rows))
    assert [each.epoch for each in nearkin.generations()] == [4]


def test_ranks_in_processes_all_get_the_same_bytes(nearkin_server: LocalService) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [
        context.Process(target=push_and_fetch, args=(nearkin_server.address, "processes", rank, answers))
        for rank in (2, 0, 1)
    ]
    for rank in ranks:
        rank.start()
    tables = [answers.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(30)
    assert len(set(tables)) == 1


def test_a_rank_without_rows_takes_part(nearkin: NeighbourClient) -> None:
    rows = maps(10, 4)
    nearkin.push(rows[10:], epoch=0, row_start=10, num_classes=10, k=3)
    nearkin.push(rows, epoch=0, k=3)
    assert len(nearkin.table(epoch=0, timeout=30)) == 10


def test_the_same_rows_with_other_bytes_are_refused(nearkin: NeighbourClient) -> None:
    rows = maps(10, 4)
    nearkin.push(rows[:5], epoch=0, num_classes=10, k=3)
    changed = rows[3:8] + 1
    with pytest.raises(AlreadyExists):
        nearkin.push(changed, epoch=0, row_start=3, num_classes=10, k=3)
    nearkin.push(rows, epoch=0, k=3)
    table = nearkin.table(epoch=0, timeout=30)
    assert table.scores is not None
    assert_is_table(table.ids, table.scores, similarities(rows))


def test_an_epoch_has_one_set_of_arguments(nearkin: NeighbourClient) -> None:
    rows = maps(10, 4)
    nearkin.push(rows[:5], epoch=0, num_classes=10, k=3)
    with pytest.raises(AlreadyExists, match="k"):
        nearkin.push(rows[5:], epoch=0, row_start=5, num_classes=10, k=4)


# ------------------------------------------------------------------------------------- commit and abort


def test_a_run_keeps_what_its_pushes_ask_for(nearkin: NeighbourClient) -> None:
    rows, little = maps(20, 6), Retention(keep_embeddings=1, keep_tables=2, keep_every=2)
    for epoch in range(6):
        nearkin.push(rows + epoch, epoch=epoch, k=3, retention=little)
        nearkin.table(epoch=epoch, timeout=30)
    eventually(lambda: {each.generation for each in nearkin.generations()} == {2, 4, 5, 6})
    eventually(lambda: nearkin.generation(5).embeddings == "dropped")
    assert all(nearkin.generation(number).embeddings != "dropped" for number in (2, 4, 6))


def test_a_build_is_given_up_in_time_and_the_epoch_can_be_pushed_again(nearkin: NeighbourClient) -> None:
    rows = maps(20_000, 64)
    push = nearkin.push(rows, epoch=0, k=64, engine="flat", build_timeout=0.02)
    eventually(lambda: nearkin.push_state(push).state == "failed")
    assert "build_timeout" in nearkin.push_state(push).error
    nearkin.push(rows[:50], epoch=0, k=3, build_timeout=60)
    assert nearkin.table(epoch=0, timeout=60).ids.shape == (50, 3)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("build_timeout", {"build_timeout": 0}),
        ("build_timeout", {"build_timeout": float("nan")}),
        ("build_timeout", {"build_timeout": float("inf")}),
        ("retention.keep_every", {"retention": Retention(keep_every=-1)}),
        ("retention.keep_tables", {"retention": Retention(keep_tables=2**31)}),
    ],
)
def test_options_out_of_their_range_are_named(
    nearkin: NeighbourClient, field: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(InvalidArgument, match=field) as wrong:
        nearkin.push(maps(20, 6), epoch=0, k=3, **arguments)
    assert wrong.value.field == field


def test_commit_false_only_stores(nearkin: NeighbourClient) -> None:
    rows = maps(10, 4)
    push = nearkin.push(rows, epoch=0, k=3, commit=False)
    assert push.state == "open"
    assert nearkin.push_state(push).stored == ((0, 10),)
    with pytest.raises(NotReadyInTime, match=r"epoch 0.*all rows are there, to be committed"):
        nearkin.table(epoch=0, timeout=0.3)
    assert nearkin.commit(push).state in ("building", "published")
    assert nearkin.table(epoch=0, timeout=30).generation == 1
    assert nearkin.push_state(push.push_id).generation == 1


def test_commit_needs_every_row_and_abort_tells_those_who_wait(nearkin: NeighbourClient) -> None:
    push = nearkin.push(maps(4, 4), epoch=2, num_classes=10, k=3)
    with pytest.raises(FailedPrecondition):
        nearkin.commit(push)
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(nearkin.table, epoch=2, timeout=30)
        assert nearkin.run_info().pushes[0].push_id == push.push_id
        assert nearkin.abort(push).state == "aborted"
        with pytest.raises((PushFailed, NotReadyInTime)):
            waiting.result()
    assert nearkin.push(maps(10, 4), epoch=2, k=3).state != "aborted"
    assert nearkin.table(epoch=2, timeout=30).epoch == 2


# ------------------------------------------------------------------------------------------- wrong rows


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_named_and_publish_nothing(nearkin: NeighbourClient, bad: float) -> None:
    rows = maps(20, 6)
    nearkin.push(rows, epoch=0, k=3)
    before = nearkin.table(epoch=0, timeout=30)
    rows[13, 2] = bad
    with pytest.raises(InvalidArgument, match="13"):
        nearkin.push(rows, epoch=1, k=3)
    after = nearkin.table()
    assert after.generation == before.generation
    assert after.ids.tobytes() == before.ids.tobytes()


def test_a_zero_row_is_named(nearkin: NeighbourClient) -> None:
    rows = maps(20, 6)
    rows[11] = 0
    with pytest.raises((InvalidArgument, PushFailed), match="11"):
        nearkin.push(rows, epoch=0, k=3)


def test_an_overflow_of_float16_is_an_error_and_no_table(nearkin: NeighbourClient) -> None:
    rows = maps(20, 6)
    rows[4, 0] = 1e6
    with pytest.raises(InvalidArgument, match="4"):
        nearkin.push(rows, epoch=0, k=3, wire_dtype="float16")


# ----------------------------------------------------------------------------------------------- tables


def test_rows_and_columns_of_a_table(nearkin: NeighbourClient) -> None:
    nearkin.push(maps(30, 6), epoch=0, k=4)
    whole = nearkin.table(epoch=0, timeout=30)
    part = nearkin.table(generation=1, rows=(10, 13), scores=False)
    assert part.row_start == 10
    assert part.scores is None
    np.testing.assert_array_equal(part.ids, whole.ids[10:13])
    with pytest.raises(InvalidArgument):
        nearkin.table(rows=(20, 31))
    with pytest.raises(InvalidArgument):
        nearkin.table(rows=(5, 5))
    with pytest.raises(InvalidArgument):
        nearkin.table(epoch=0, generation=1)


def test_tables_are_values(nearkin: NeighbourClient) -> None:
    nearkin.push(maps(5, 6), epoch=0, k=2)
    table = nearkin.table(epoch=0, timeout=30)
    with pytest.raises(ValueError, match="read-only"):
        table.ids[0, 0] = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.epoch = 9  # type: ignore[misc]


def test_an_epoch_or_a_later_one(nearkin: NeighbourClient) -> None:
    for epoch in (0, 3):
        nearkin.push(maps(5, 6), epoch=epoch, k=2)
        nearkin.table(epoch=epoch, timeout=30)
    assert nearkin.table(epoch=1).epoch == 3
    assert nearkin.table(epoch=0).epoch == 3
    assert nearkin.table(generation=1).epoch == 0
    with pytest.raises(NotReadyInTime):
        nearkin.table(epoch=4, timeout=0.2)


def test_what_is_not_there_is_not_found(nearkin: NeighbourClient) -> None:
    with pytest.raises(NotFound):
        nearkin.table()
    with pytest.raises(NotFound):
        nearkin.generation()
    with pytest.raises(NotFound):
        nearkin.push_state("no-such-push")
    nearkin.push(maps(5, 6), epoch=0, k=2)
    nearkin.table(epoch=0, timeout=30)
    with pytest.raises(NotFound):
        nearkin.table(generation=2)


# ---------------------------------------------------------------------------------- queries, catalogue


def test_nearest_classes_are_those_of_the_table_for_any_k(nearkin: NeighbourClient) -> None:
    rows = maps(40, 6)
    nearkin.push(rows, epoch=0, k=3)
    nearkin.table(epoch=0, timeout=30)
    hits = nearkin.nearest(classes=np.array([3, 14, 3]), k=20)
    assert (hits.ids.shape, hits.generation, hits.epoch) == ((3, 20), 1, 0)
    assert_is_table(hits.ids, hits.scores, similarities(rows)[[3, 14, 3]])
    assert nearkin.nearest(classes=[5]).ids.shape == (1, 3)


def test_nearest_to_vectors_numpy_and_torch(nearkin: NeighbourClient) -> None:
    rows = maps(40, 6, 2, 2)
    nearkin.push(rows, epoch=0, k=3)
    nearkin.table(epoch=0, timeout=30)
    hits = nearkin.nearest(vectors=rows[[8, 30]] * 5, k=4)
    assert hits.ids[:, 0].tolist() == [8, 30]
    np.testing.assert_allclose(hits.scores[:, 0], 1, atol=1e-5)
    from_torch = nearkin.nearest(vectors=torch.from_numpy(rows[[8, 30]]), k=4)
    np.testing.assert_array_equal(from_torch.ids, hits.ids)


def test_many_queries_take_many_requests(nearkin: NeighbourClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nearkin_client.queries.MOST_QUERIES", 7)
    rows = maps(30, 6)
    nearkin.push(rows, epoch=0, k=3)
    table = nearkin.table(epoch=0, timeout=30)
    np.testing.assert_array_equal(nearkin.nearest(classes=range(30)).ids, table.ids)
    assert nearkin.nearest(vectors=rows, k=1).ids[:, 0].tolist() == list(range(30))
    rows[16] = np.nan
    with pytest.raises(InvalidArgument, match=r"vector 2: .*vector 0 is number 14 of those given"):
        nearkin.nearest(vectors=rows)
    rows[5] = 0
    with pytest.raises(InvalidArgument, match=r"vector 5: .* declare the class absent$"):
        nearkin.nearest(vectors=rows)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"classes": [1], "vectors": np.ones((1, 6), np.float32)},
        {"classes": []},
        {"classes": [1.5]},
        {"classes": [10]},
        {"classes": [-1]},
        {"classes": [1], "k": 10},
        {"classes": [1], "k": 0},
        {"vectors": np.ones((1, 5), np.float32)},
        {"vectors": np.full((1, 6), np.nan, np.float32)},
        {"vectors": np.zeros((1, 6), np.float32)},
    ],
)
def test_wrong_queries(nearkin: NeighbourClient, arguments: dict[str, Any]) -> None:
    nearkin.push(maps(10, 6), epoch=0, k=3)
    nearkin.table(epoch=0, timeout=30)
    with pytest.raises(InvalidArgument):
        nearkin.nearest(**arguments)


@pytest.mark.parametrize("address", ["unix:///tmp/\udcff", "h\udcff:77", "host:77\n", "host:²"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(InvalidArgument, match="address: ") as caught:
        NeighbourClient(address)
    assert caught.value.field == "address"


@pytest.mark.parametrize("token", ["secret\n", " secret", "sécret", "two words"])
def test_a_token_that_cannot_be_sent_is_not_shown(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("NEARKIN_TOKEN", token)
    with pytest.raises(InvalidArgument, match="line end") as caught:
        NeighbourClient("127.0.0.1:1")
    assert caught.value.field == "token"
    assert token.strip() not in str(caught.value)


@pytest.mark.parametrize("number", [0, -1, 2.5, 2**63, np.float32(1), "1"])
def test_numbers_that_are_none_of_the_protocols(nearkin: NeighbourClient, number: Any) -> None:
    for field, ask in (
        ("generation", lambda: nearkin.table(generation=number)),
        ("generation", lambda: nearkin.generation(number)),
        ("generation", lambda: nearkin.delete_generation(number)),
        ("generation", lambda: nearkin.pin(number)),
        ("generation", lambda: nearkin.nearest(classes=[0], generation=number)),
        ("k", lambda: nearkin.nearest(classes=[0], k=number)),
        ("k", lambda: nearkin.compare(k=number)),
        ("base", lambda: nearkin.compare(number)),
        ("most_changed", lambda: nearkin.compare(most_changed=number)),
        ("epoch", lambda: nearkin.table(epoch=number if number != 0 else -2)),
        ("rows", lambda: nearkin.table(rows=(number, 0))),
    ):
        with pytest.raises(InvalidArgument, match=re.escape(f"{field}: ")) as caught:
            ask()
        assert caught.value.field == field


def test_numpys_integers_are_numbers(nearkin: NeighbourClient) -> None:
    nearkin.push(generator.standard_normal((9, 4)).astype(np.float32), epoch=0, k=3)
    assert len(nearkin.table(epoch=np.int64(0), rows=(np.int32(2), np.uint8(5)))) == 3  # type: ignore[arg-type]
    assert nearkin.nearest(classes=[1], k=np.int64(2)).ids.shape == (1, 2)  # type: ignore[arg-type]


def test_no_name_is_not_this_run(nearkin: NeighbourClient) -> None:
    nearkin.push(generator.standard_normal((9, 4)).astype(np.float32), epoch=0, k=3)
    nearkin.table(epoch=0)
    with pytest.raises(InvalidArgument):
        nearkin.delete_run("")
    assert nearkin.run_info().generations == 1


@pytest.mark.parametrize("seconds", [math.inf, 1e300, 1e12])
def test_a_deadline_beyond_all_times_is_none(nearkin: NeighbourClient, seconds: float) -> None:
    nearkin.push(generator.standard_normal((9, 4)).astype(np.float32), epoch=0, k=3, timeout=seconds)
    assert nearkin.table(epoch=0, timeout=seconds).k == 3
    assert nearkin.nearest(classes=[0], timeout=seconds).ids.shape == (1, 3)
    assert isinstance(next(nearkin.watch(timeout=seconds)), RunSnapshot)


def test_the_catalogue(nearkin: NeighbourClient) -> None:
    rows = maps(30, 6)
    for epoch in range(3):
        nearkin.push(rows, epoch=epoch, k=3)
        nearkin.table(epoch=epoch, timeout=30)
    name = nearkin.run_info().run
    assert [each.generation for each in nearkin.generations()] == [3, 2, 1]
    mine = next(each for each in nearkin.runs() if each.run == name)
    assert mine.newest is not None
    assert (mine.generations, mine.newest.epoch) == (3, 2)
    newest = nearkin.generation()
    assert newest.engine in ("flat", "mixed")
    assert (newest.exact, newest.recall) == (True, None)
    assert newest.build_seconds >= 0
    nearkin.delete_generation(2)
    assert [each.generation for each in nearkin.generations()] == [3, 1]
    nearkin.delete_run()
    with pytest.raises(NotFound):
        nearkin.generations()


def test_compare(nearkin: NeighbourClient) -> None:
    rows = maps(30, 6)
    nearkin.push(rows, epoch=0, k=4)
    nearkin.table(epoch=0, timeout=30)
    rows[5] = -rows[5]
    nearkin.push(rows, epoch=1, k=4)
    nearkin.table(epoch=1, timeout=30)
    found = nearkin.compare(1, 2, most_changed=3)
    assert (found.base_generation, found.generation, found.k, found.classes_compared) == (1, 2, 4, 30)
    assert found.most_changed[0].class_id == 5
    assert found.most_changed[0].overlap == 0
    assert found.most_changed[0].movement == pytest.approx(2, abs=1e-4)
    assert found.mean_movement == pytest.approx(2 / 30, abs=1e-4)
    assert nearkin.compare() == nearkin.compare(1, 2)
    assert nearkin.compare(1, 1).mean_overlap == 1
    with pytest.raises(NearkinError):
        nearkin.compare(1, 9)


def test_server_info(nearkin_server: LocalService) -> None:
    with NeighbourClient(nearkin_server.address) as client:
        info = client.server_info()
        assert next(each for each in info.engines if each.name == "flat").available
        assert info.chunk_bytes >= 1 << 16
        assert info.limits["max_num_classes"] > 0
        with pytest.raises(InvalidArgument, match="run"):
            client.table()


@pytest.mark.parametrize("shared", [True, False])
def test_rows_that_their_owner_changes_during_the_push(
    nearkin_server: LocalService, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    rows = maps(50, 64)

    def summed_up(piece: memoryview, crc: int = 0) -> int:
        found = crc32c(piece, crc)
        rows[:] += 1
        return found

    def push_and_read() -> None:
        client.push(rows, epoch=0, k=7)
        client.table(epoch=0, timeout=60)

    where = "nearkin_client.shared.crc32c" if shared else "nearkin_client.push.crc32c"
    monkeypatch.setattr(where, summed_up)
    with (
        NeighbourClient(nearkin_server.address, run=f"changing-{shared:d}", shared_memory=shared) as client,
        pytest.raises(PushFailed if shared else DataLoss, match="changed by their owner while"),
    ):
        push_and_read()
