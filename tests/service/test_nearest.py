"""Nearest and CompareGenerations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service.config import Limits

from tests.service.conftest import Caller, Service, brute_force, eventually, random_rows, refusal

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


def vectors(rows: Any, dtype: Any = pb.DTYPE_FLOAT32, **changes: Any) -> pb.Vectors:
    arguments: dict[str, Any] = {"count": len(rows), "dtype": dtype, "payload": rows.tobytes()}
    return pb.Vectors(**arguments | changes)


def test_nearest_of_classes_is_the_table_for_any_k(caller: Caller) -> None:
    rows = random_rows(50, 6)
    caller.push(rows, k=5)
    for k in (0, 1, 20, 49):
        answer = caller.nearest([3, 49, 3], k=k)
        expected = brute_force(rows, k or 5)[[3, 49, 3]]
        np.testing.assert_array_equal([row.ids for row in answer.rows], expected)
    assert (answer.generation, answer.epoch) == (1, 0)
    assert len(caller.nearest([]).rows) == 0


@pytest.mark.parametrize(
    ("code", "dtype"), [(1, np.float32), (2, np.float16), (3, ml_dtypes.bfloat16)], ids=["f32", "f16", "bf16"]
)
def test_nearest_of_vectors_includes_the_class_itself(caller: Caller, code: Any, dtype: Any) -> None:
    rows = random_rows(50, 2, 3, 1, dtype=dtype)
    caller.push(rows, k=5)
    answer = caller.nearest(vectors=vectors(rows[[7, 9]], code), k=50)
    assert [row.ids[0] for row in answer.rows] == [7, 9]
    assert answer.rows[0].scores[0] == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal([row.ids[1:] for row in answer.rows], brute_force(rows, 49)[[7, 9]])


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"classes": pb.ClassIds(ids=[50])}, INVALID),
        ({"classes": pb.ClassIds(ids=[-1])}, INVALID),
        ({"classes": pb.ClassIds(ids=[2**63 - 1])}, INVALID),
        ({"classes": pb.ClassIds(ids=[0]), "k": 50}, INVALID),
        ({"classes": pb.ClassIds(ids=[0]), "k": -1}, INVALID),
        ({"classes": pb.ClassIds(ids=[0]), "generation": -1}, INVALID),
        ({"classes": pb.ClassIds(ids=[0]), "generation": 2}, NOT_FOUND),
        ({"classes": pb.ClassIds(ids=[0]), "run": "other"}, NOT_FOUND),
        ({}, INVALID),
        ({"vectors": vectors(random_rows(1, 6), count=2)}, INVALID),
        ({"vectors": vectors(random_rows(1, 6), count=-1)}, INVALID),
        ({"vectors": vectors(random_rows(1, 6), count=2**62)}, INVALID),
        ({"vectors": vectors(random_rows(1, 5))}, INVALID),
        ({"vectors": vectors(random_rows(1, 6), dtype=0)}, INVALID),
        ({"vectors": vectors(np.full((1, 6), np.nan, np.float32))}, INVALID),
        ({"vectors": vectors(np.zeros((1, 6), np.float32))}, INVALID),
        ({"vectors": vectors(random_rows(1, 6)), "k": 51}, INVALID),
    ],
    ids=lambda value: str(value).replace("\n", " ")[:50],
)
def test_nearest_refusals(caller: Caller, request_: dict[str, Any], code: grpc.StatusCode) -> None:
    caller.push(random_rows(50, 6))
    message = pb.NearestRequest(**{"run": "run"} | request_)
    assert refusal(lambda: caller.stub.Nearest(message)).code() is code


def test_queries_are_limited(start_service: Callable[..., Service]) -> None:
    caller = start_service(limits=Limits(max_nearest_queries=3)).caller()
    caller.push(random_rows(50, 6))
    assert len(caller.nearest([1, 2, 3]).rows) == 3
    assert refusal(lambda: caller.nearest([1, 2, 3, 4])).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_searchers_beyond_the_memory_bound_are_opened_again(start_service: Callable[..., Service]) -> None:
    caller = start_service(searcher_memory_bytes=1).caller()
    data = [random_rows(50, 6, seed=seed) for seed in (0, 1)]
    for epoch, rows in enumerate(data):
        caller.push(rows, epoch)
    for _ in range(2):
        for number, rows in enumerate(data, 1):
            answer = caller.nearest([8], generation=number)
            np.testing.assert_array_equal(answer.rows[0].ids, brute_force(rows, 5)[8])


def test_retention_keeps_two_embeddings_and_every_table(caller: Caller) -> None:
    for epoch in range(4):
        caller.push(random_rows(20, 4, seed=epoch), epoch)
    states = eventually(
        lambda: [g.embeddings for g in caller.generations()],
        lambda found: (
            found[0] == found[1] == pb.EMBEDDINGS_STATE_KEPT and found[2] == pb.EMBEDDINGS_STATE_DROPPED
        ),
    )
    assert states[3] == pb.EMBEDDINGS_STATE_DROPPED
    error = refusal(lambda: caller.nearest([0], generation=2))
    assert error.code() is PRECONDITION
    assert "retention" in error.details()
    assert caller.nearest([0], generation=3).generation == 3
    np.testing.assert_array_equal(caller.table(generation=1).ids, brute_force(random_rows(20, 4, seed=0), 5))


def test_retention_of_tables_and_of_every_mth(caller: Caller) -> None:
    policy = pb.Retention(keep_embeddings=1, keep_tables=2, keep_every=3)
    for epoch in range(8):
        caller.push(random_rows(20, 4, seed=epoch), epoch, retention=policy)
    kept = eventually(lambda: [g.generation for g in caller.generations()], lambda found: len(found) == 4)
    assert kept == [8, 7, 6, 3]
    assert caller.nearest([0], generation=3).generation == 3
    assert refusal(lambda: caller.nearest([0], generation=7)).code() is PRECONDITION


def test_comparing_generations(caller: Caller) -> None:
    first, second = random_rows(60, 6, seed=1), random_rows(60, 6, seed=2)
    second[20:] = first[20:]
    caller.push(first, 0, k=8)
    caller.push(second, 1, k=5, absent=[59])
    answer = caller.stub.CompareGenerations(pb.CompareGenerationsRequest(run="run", most_changed=60))
    assert (answer.generation, answer.base_generation, answer.k, answer.classes_compared) == (2, 1, 5, 59)
    was, now = brute_force(first, 5), brute_force(second, 5, absent=[59])
    overlap = np.array([len({*was[i]} & {*now[i]}) / 5 for i in range(59)])
    assert answer.mean_overlap == pytest.approx(overlap.mean())
    np.testing.assert_allclose(answer.overlap_deciles, np.quantile(overlap, np.linspace(0, 1, 11)))
    cosine = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    listed = {change.class_id: change for change in answer.most_changed}
    assert len(listed) == 59
    for class_id, change in listed.items():
        assert change.overlap == pytest.approx(overlap[class_id])
        assert change.movement == pytest.approx(1 - cosine[class_id], abs=1e-5)
    assert answer.mean_movement == pytest.approx((1 - cosine[:59]).mean(), abs=1e-5)
    assert [c.overlap for c in answer.most_changed] == sorted(c.overlap for c in answer.most_changed)


def test_a_class_that_stayed_has_not_moved(caller: Caller) -> None:
    """By not one rounding error: they would decide which of those with the same overlap comes first."""
    first = random_rows(200, 7, seed=3)
    second = first.copy()
    second[::10] = random_rows(20, 7, seed=4)
    caller.push(first, 0, k=1)
    caller.push(second, 1, k=1)
    answer = caller.stub.CompareGenerations(pb.CompareGenerationsRequest(run="run", most_changed=200))
    assert [c.class_id for c in answer.most_changed if c.movement] != []
    assert all(c.movement == 0 for c in answer.most_changed if c.class_id % 10)
    order = [(c.overlap, -c.movement, c.class_id) for c in answer.most_changed]
    assert order == sorted(order)


def test_comparing_without_embeddings_leaves_movement_out(caller: Caller) -> None:
    for epoch in range(2):
        caller.push(random_rows(20, 4), epoch, retention=pb.Retention(keep_embeddings=1))
    eventually(lambda: caller.generation(1).embeddings, lambda s: s == pb.EMBEDDINGS_STATE_DROPPED)
    answer = caller.stub.CompareGenerations(pb.CompareGenerationsRequest(run="run"))
    assert answer.mean_overlap == 1
    assert not answer.HasField("mean_movement")
    assert not answer.most_changed[0].HasField("movement")


def test_comparing_refusals(caller: Caller) -> None:
    def compare(**request: Any) -> grpc.StatusCode:
        message = pb.CompareGenerationsRequest(**{"run": "run"} | request)
        code = refusal(lambda: caller.stub.CompareGenerations(message)).code()
        assert isinstance(code, grpc.StatusCode)
        return code

    assert compare() is NOT_FOUND
    caller.push(random_rows(20, 4))
    assert compare() is NOT_FOUND, "there is none before the first"
    caller.push(random_rows(21, 4), epoch=1)
    assert compare() is PRECONDITION
    caller.push(random_rows(21, 4), epoch=2)
    assert compare(generation=9) is NOT_FOUND
    assert compare(k=6) is INVALID
    assert compare(most_changed=-1) is INVALID
    assert compare(generation=-1) is INVALID
