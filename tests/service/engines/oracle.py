"""The truth in float64, and what it means for a table to agree with it."""

from __future__ import annotations

from typing import Any

import numpy as np
from nearkin_service.engines import BuildRequest, BuiltTable, build_table
from nearkin_service.engines.pacing import Silence
from numpy.typing import NDArray

GAP = 1e-6


def build(
    rows: NDArray[Any],
    k: int,
    engine: str = "flat",
    *,
    absent: Any = (),
    key: Any = "flat",
    shape: tuple[int, ...] | None = None,
) -> BuiltTable:
    """A table on the CPU, without the service around it."""
    absent_ids = np.asarray(absent, np.int64)
    request = BuildRequest(shape or (rows.shape[1],), key, k, engine, "cpu", absent_ids)
    return build_table(rows, request, Silence())


def true_scores(
    rows: NDArray[Any], absent: Any = (), shape: tuple[int, ...] | None = None
) -> NDArray[np.float64]:
    """Cosines of all pairs in float64; -inf for a class with itself and with absent ones."""
    exact = rows.astype(np.float64)
    if shape is not None:
        exact = exact.reshape(len(rows), shape[0], -1).mean(axis=2)
    there = np.setdiff1d(np.arange(len(rows)), absent)
    scores = np.full((len(rows), len(rows)), -np.inf)
    unit = exact[there] / np.linalg.norm(exact[there], axis=1, keepdims=True)
    scores[np.ix_(there, there)] = unit @ unit.T
    np.fill_diagonal(scores, -np.inf)
    return scores


def assert_agrees(table: BuiltTable, truth: NDArray[np.float64]) -> None:
    """Every row holds the k best, but where the truth at the k-th place is closer than `GAP`."""
    ids, scores = table.ids, table.scores
    assert ids.dtype == np.int32
    assert scores.dtype == np.float32
    k = ids.shape[1]
    best = -np.sort(-truth, axis=1)[:, :k]
    empty = ids < 0
    np.testing.assert_array_equal(empty, np.isneginf(best))
    np.testing.assert_array_equal(empty, np.isneginf(scores))
    mine = np.where(empty, -np.inf, np.take_along_axis(truth, np.maximum(ids, 0), axis=1))
    np.testing.assert_allclose(scores[~empty], mine[~empty], rtol=0, atol=GAP)
    kth = np.where(np.isneginf(best), np.inf, best).min(axis=1, keepdims=True)
    assert ((mine > kth - GAP) | empty).all(), "a class that is not among the k best"
    must = truth > kth + GAP
    held = np.zeros_like(must)
    rows = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
    held[rows[~empty], ids[~empty]] = True
    assert (held | ~must).all(), "one of the k best is missing"
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in ids), "a class twice in one row"
    assert_ordered(ids, scores)


def assert_ordered(ids: NDArray[np.int32], scores: NDArray[np.float32]) -> None:
    """Scores descend, equal scores have ascending ids, -1 comes last."""
    falling = scores[:, 1:] < scores[:, :-1]
    tied = (scores[:, 1:] == scores[:, :-1]) & ((ids[:, 1:] > ids[:, :-1]) | (ids[:, 1:] < 0))
    assert (falling | tied).all()
