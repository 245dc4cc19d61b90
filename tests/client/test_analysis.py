"""What a whole table tells: pairs of nearest classes, and how often a class is a neighbour."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nearkin_client import InvalidArgument, NeighbourTable
from nearkin_client.analysis import nearest_pairs, times_listed
from numpy.typing import NDArray


def table_of(rows: NDArray[np.float64], k: int, absent: int = 0) -> NeighbourTable:
    """By brute force; the last classes are absent."""
    keys = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    scores = (keys @ keys.T).astype(np.float32)
    np.fill_diagonal(scores, -np.inf)
    if absent:
        scores[-absent:] = scores[:, -absent:] = -np.inf
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int32)
    best = np.take_along_axis(scores, ids, 1)
    return NeighbourTable(np.where(np.isfinite(best), ids, -1).astype(np.int32), best, 1, 0)


@given(st.integers(2, 30), st.integers(0, 2**32), st.integers(0, 2))
def test_pairs_and_counts_are_those_of_a_loop(count: int, seed: int, absent: int) -> None:
    random = np.random.default_rng(seed)
    table = table_of(random.integers(1, 4, (count, 3)).astype(np.float64), min(4, count - 1), absent)
    assert table.scores is not None
    nearest = {own: int(ids[0]) for own, ids in enumerate(table.ids) if ids[0] >= 0}
    scores = {tuple(sorted((own, other))): float(table.scores[own, 0]) for own, other in nearest.items()}
    found = nearest_pairs(table)
    listed = list(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert listed == sorted(scores, key=lambda pair: (-scores[pair], pair))
    assert found.scores.tolist() == [scores[pair] for pair in listed]
    assert found.mutual.tolist() == [nearest.get(a) == b and nearest.get(b) == a for a, b in listed]
    assert len(found.from_score(0.9)) == sum(score >= 0.9 for score in found.scores)
    assert times_listed(table).tolist() == [int((table.ids == each).sum()) for each in range(count)]


def test_a_part_of_a_table_is_refused() -> None:
    whole = table_of(np.random.default_rng(0).standard_normal((9, 4)), 3)
    assert whole.scores is not None
    for rows in (slice(3, 6), slice(0, 3)):
        part = NeighbourTable(whole.ids[rows], whole.scores[rows], 1, 0, rows.start)
        with pytest.raises(InvalidArgument, match="not a part"):
            nearest_pairs(part)
    with pytest.raises(InvalidArgument, match="scores"):
        nearest_pairs(NeighbourTable(whole.ids, None, 1, 0))
