"""Key `qaconv` over the wire, against a float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from numpy.typing import NDArray

from tests.service.conftest import Caller, Service, brute_force, random_rows, refusal

MAPS = random_rows(40, 6, 3, 2)
WEIGHTS = np.random.default_rng(1).standard_normal(12).astype(np.float32)
EQUAL = np.full(12, 1 / 12)


def location_scores(maps: NDArray[Any], weights: NDArray[Any]) -> NDArray[np.float64]:
    """Every pair's score by definition, float64 [N, N], the row's map as probe."""
    flat_NCL = maps.astype(np.float64).reshape(len(maps), maps.shape[1], -1)
    flat_NCL /= np.linalg.norm(flat_NCL, axis=1, keepdims=True)
    similar = np.einsum("pcr,ncs->pnrs", flat_NCL, flat_NCL)
    maxima = np.concatenate([similar.max(axis=3), similar.max(axis=2)], axis=2)
    scores: NDArray[np.float64] = maxima @ weights.astype(np.float64)
    return scores


def reranked(maps: NDArray[Any], k: int, candidates: int, weights: NDArray[Any]) -> NDArray[np.int64]:
    """The table by definition: the best k, by location, of the nearest candidates by pooled key."""
    pooled = brute_force(maps.astype(np.float64).mean(axis=(2, 3)), candidates)
    scores = np.take_along_axis(location_scores(maps, weights), pooled, axis=1)
    order = np.argsort(-scores, axis=1)[:, :k]
    return np.take_along_axis(pooled, order, axis=1)


@pytest.mark.parametrize("weights", [(), WEIGHTS.tolist()], ids=["mean", "weighted"])
@pytest.mark.parametrize("candidates", [0, 5, 11])
def test_tables_and_queries_are_those_of_the_definition(
    start_service: Callable[..., Service], weights: list[float], candidates: int
) -> None:
    """By classes and by vectors, and again after a restart."""
    service = start_service()
    options: dict[str, Any] = {"qaconv_candidates": candidates, "qaconv_weights": weights}
    caller = service.caller()
    caller.push(MAPS, key=pb.KEY_QACONV, **options)
    used = np.array(weights or EQUAL)
    expected = reranked(MAPS, 5, candidates or 39, used)
    table = caller.table()
    np.testing.assert_array_equal(table.ids, expected)
    assert table.scores is not None
    truth = np.take_along_axis(location_scores(MAPS, used), expected, axis=1)
    np.testing.assert_allclose(table.scores, truth, atol=1e-5)
    assert table.generation.key == pb.KEY_QACONV
    for _ in range(2):
        answer = caller.nearest(list(range(40)))
        np.testing.assert_array_equal([row.ids for row in answer.rows], expected)
        vectors = pb.Vectors(count=2, dtype=pb.DTYPE_FLOAT32, payload=MAPS[[3, 4]].tobytes())
        if not weights:
            assert [row.ids[0] for row in caller.nearest(vectors=vectors, k=1).rows] == [3, 4]
        service.stop()
        service = start_service()
        caller = service.caller()


def test_absent_classes_are_nobodys_neighbour(caller: Caller) -> None:
    maps = MAPS.copy()
    maps[7] = maps[20]
    caller.push(maps, key=pb.KEY_QACONV, absent=[0, 39])
    ids = caller.table().ids
    assert (ids[[0, 39]] == -1).all()
    assert not {0, 39} & set(ids[1:39].ravel().tolist())
    assert (ids[7, 0], ids[20, 0]) == (20, 7)


def test_ranks_must_agree_on_weights(caller: Caller) -> None:
    caller.begin(MAPS, key=pb.KEY_QACONV, qaconv_weights=WEIGHTS)
    error = refusal(lambda: caller.begin(MAPS, key=pb.KEY_QACONV, qaconv_weights=-WEIGHTS))
    assert "qaconv_weights" in str(error.details())


@pytest.mark.parametrize(
    ("rows", "options", "field"),
    [
        (MAPS, {"qaconv_weights": [1.0] * 11}, "qaconv_weights"),
        (MAPS, {"qaconv_weights": [np.nan] * 12}, "qaconv_weights"),
        (MAPS, {"qaconv_candidates": -1}, "qaconv_candidates"),
        (MAPS.reshape(40, -1), {}, "key"),
    ],
)
def test_refusals_name_the_field(caller: Caller, rows: Any, options: dict[str, Any], field: str) -> None:
    error = refusal(lambda: caller.begin(rows, key=pb.KEY_QACONV, **options))
    assert str(error.details()).startswith(field)


def test_the_service_says_that_it_has_it(caller: Caller) -> None:
    assert "qaconv" in caller.stub.GetServerInfo(pb.GetServerInfoRequest()).features
