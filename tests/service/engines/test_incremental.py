"""An updated table is the same bytes as a full build, whatever changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nearkin_service.engines import BuildRequest, Parent, build_table, update_table
from nearkin_service.engines.pacing import Silence
from numpy.typing import NDArray

from tests.service.engines.test_exact import ENGINES

NOBODY = np.empty(0, np.int64)


def assert_updates(
    before: NDArray[Any], after: NDArray[Any], k: int, engine: str, absent: Any = (NOBODY, NOBODY)
) -> int:
    """Returns how many rows were searched in full."""
    shape = (before.shape[1],)
    old, new = (BuildRequest(shape, "flat", k, engine, "cpu", gone) for gone in absent)
    parent = build_table(before, old, Silence())
    updated = update_table(after, new, Parent(before, parent.ids, parent.scores, absent[0]), Silence())
    full = build_table(after, new, Silence())
    assert updated.ids.tobytes() == full.ids.tobytes()
    assert updated.scores.tobytes() == full.scores.tobytes()
    assert updated.engine == full.engine
    return updated.recomputed_rows


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.15, 0.6])
def test_some_rows_changed(engine: str, share: float) -> None:
    random = np.random.default_rng(1)
    before = random.standard_normal((2200, 24), dtype=np.float32)
    after = before.copy()
    rows = random.permutation(2200)[: int(share * 2200)]
    after[rows] = random.standard_normal((len(rows), 24), dtype=np.float32)
    assert_updates(before, after, 12, engine)


def test_little_is_searched_when_little_changed() -> None:
    before = np.random.default_rng(1).standard_normal((3000, 64), dtype=np.float32)
    after = before.copy()
    after[100] = -after[100]
    assert assert_updates(before, after, 10, "flat") < 300


def test_classes_come_and_go() -> None:
    random = np.random.default_rng(2)
    rows = random.standard_normal((1500, 16), dtype=np.float32)
    before, after = np.arange(0, 40), np.arange(20, 70)
    assert_updates(rows, rows, 9, "flat", (before, after))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ties_and_twins(data: Any) -> None:
    count = data.draw(st.integers(20, 400))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    before = random.integers(-1, 2, (count, 4)).astype(np.float32)
    before[~before.any(axis=1), 0] = 1
    after = before.copy()
    rows = random.permutation(count)[: data.draw(st.integers(0, count // 5))]
    after[rows] = after[random.integers(0, count, len(rows))]
    assert_updates(before, after, data.draw(st.integers(1, count - 1)), "flat")
