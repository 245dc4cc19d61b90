"""Key `qaconv` against a plain loop over pairs and locations."""

from __future__ import annotations

import numpy as np
import pytest
from nearkin_service.engines import BuildRequest, LocationOptions, build_table, open_searcher
from nearkin_service.engines.pacing import Silence

from tests.service.engines.oracle import assert_ordered

SHAPE = (6, 3, 2)
NOBODY = np.empty(0, np.int64)


def plain_score(one: np.ndarray, other: np.ndarray, weights: np.ndarray) -> float:
    p, c = (row.astype(np.float64).reshape(SHAPE[0], -1) for row in (one, other))
    p, c = p / np.linalg.norm(p, axis=0), c / np.linalg.norm(c, axis=0)
    maxima = [max(p[:, r] @ c[:, s] for s in range(6)) for r in range(6)]
    maxima += [max(p[:, r] @ c[:, s] for r in range(6)) for s in range(6)]
    return float(np.mean(maxima) if not weights.size else np.dot(weights, maxima))


def request(k: int, weights: np.ndarray, candidates: int, absent: np.ndarray = NOBODY) -> BuildRequest:
    return BuildRequest(SHAPE, "qaconv", k, "auto", "cpu", absent, LocationOptions(candidates, weights))


@pytest.mark.parametrize("weighted", [False, True])
def test_all_candidates_give_the_true_order(weighted: bool) -> None:
    random = np.random.default_rng(1)
    rows = random.standard_normal((40, 36), dtype=np.float32)
    weights = random.standard_normal(12, dtype=np.float32) if weighted else np.empty(0, np.float32)
    table = build_table(rows, request(5, weights, 39), Silence())
    assert_ordered(table.ids, table.scores)
    for own in range(40):
        truth = np.array(
            [-np.inf if own == other else plain_score(rows[own], rows[other], weights) for other in range(40)]
        )
        np.testing.assert_allclose(table.scores[own], -np.sort(-truth)[:5], atol=1e-5)
        np.testing.assert_allclose(truth[table.ids[own]], table.scores[own], atol=1e-5)


def test_candidates_come_from_the_pooled_key() -> None:
    rows = np.random.default_rng(2).standard_normal((60, 36), dtype=np.float32)
    pooled = build_table(rows, BuildRequest(SHAPE, "pooled", 7, "auto", "cpu", NOBODY), Silence())
    table = build_table(rows, request(7, np.empty(0, np.float32), 7), Silence())
    np.testing.assert_array_equal(np.sort(table.ids, axis=1), np.sort(pooled.ids, axis=1))


def test_absent_classes_and_twins() -> None:
    rows = np.random.default_rng(3).standard_normal((30, 36), dtype=np.float32)
    rows[11] = rows[4]
    rows[20:] = np.nan
    table = build_table(rows, request(4, np.empty(0, np.float32), 29, np.arange(20, 30)), Silence())
    assert (table.ids[20:] == -1).all()
    assert table.ids[:20].max() < 20
    assert table.ids[4, 0] == 11
    assert table.ids[11, 0] == 4


def test_queries_get_the_tables_rows() -> None:
    rows = np.random.default_rng(4).standard_normal((50, 36), dtype=np.float32)
    table = build_table(rows, request(6, np.empty(0, np.float32), 48), Silence())
    searcher = open_searcher(rows, SHAPE, "qaconv", NOBODY, "cpu")
    np.testing.assert_array_equal(searcher.nearest_to_classes(np.arange(50), 6).ids, table.ids)
    assert searcher.nearest_to_vectors(rows[3:4], 1).ids[0, 0] == 3


def test_queries_rerank_as_many_candidates_as_the_table_did() -> None:
    rows = np.random.default_rng(5).standard_normal((50, 36), dtype=np.float32)
    options = LocationOptions(7, np.random.default_rng(6).standard_normal(12, dtype=np.float32))
    table = build_table(rows, request(6, options.weights, options.candidates), Silence())
    searcher = open_searcher(rows, SHAPE, "qaconv", NOBODY, "cpu", qaconv=options)
    np.testing.assert_array_equal(searcher.nearest_to_classes(np.arange(50), 6).ids, table.ids)


def test_weights_and_shapes_are_checked() -> None:
    rows = np.ones((5, 36), np.float32)
    with pytest.raises(ValueError, match="send 12"):
        build_table(rows, request(2, np.ones(7, np.float32), 0), Silence())
    vectors = BuildRequest((36,), "qaconv", 2, "auto", "cpu", NOBODY)
    with pytest.raises(ValueError, match="compares maps"):
        build_table(rows, vectors, Silence())
