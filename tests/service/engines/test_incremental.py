"""An updated table is the same bytes as a full build, whatever changed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nearkin_service.engines import BuildRequest, BuiltTable, Parent, build_table, update_table
from nearkin_service.engines.pacing import Silence
from numpy.typing import NDArray

from tests.service.engines.oracle import assert_agrees, true_scores
from tests.service.engines.test_exact import ENGINES, needs_mixed
from tests.service.engines.test_hunt import KINDS

NOBODY = np.empty(0, np.int64)


def assert_updates(
    before: NDArray[Any], after: NDArray[Any], k: int, engine: str, absent: Any = (NOBODY, NOBODY)
) -> int:
    """Returns how many rows were searched in full."""
    shape = (before.shape[1],)
    old, new = (BuildRequest(shape, "flat", k, engine, "cpu", gone) for gone in absent)
    parent = build_table(before, old, Silence())
    since = Parent(before, parent.ids, parent.scores, absent[0], parent.reserve)
    updated = update_table(after, new, since, Silence())
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


def test_a_reserve_spares_the_searches_of_rows_that_lost_a_neighbour() -> None:
    random = np.random.default_rng(1)
    before = random.standard_normal((2500, 32), dtype=np.float32)
    after = before.copy()
    rows = random.permutation(2500)[:250]
    after[rows] = random.standard_normal((250, 32), dtype=np.float32)
    request = BuildRequest((32,), "flat", 32, "flat", "cpu", NOBODY)
    parent = build_table(before, request, Silence())
    assert parent.reserve is not None
    assert parent.reserve.ids.shape == (2500, 8)
    searched = []
    for reserve in (parent.reserve, None):
        since = Parent(before, parent.ids, parent.scores, NOBODY, reserve)
        searched.append(update_table(after, request, since, Silence()).recomputed_rows)
    assert searched[0] < 250 + 60
    assert searched[1] > 250 + 800


@pytest.mark.parametrize(
    ("classes", "k", "engine", "key"),
    [
        (2048, 8, "flat", "flat"),
        (2100, 8, "ivf", "flat"),
        (2100, 2, "flat", "qaconv"),
        (2100, 2099, "flat", "flat"),
    ],
)
def test_where_no_reserve_is_held(classes: int, k: int, engine: str, key: Any) -> None:
    rows = np.random.default_rng(1).standard_normal((classes, 8), dtype=np.float32)
    table = build_table(rows, BuildRequest((8, 1, 1), key, k, engine, "cpu", NOBODY), Silence())
    assert table.reserve is None


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reserve_is_not_worth_a_search(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every class has 20 like it and nobody else above zero: what lies beyond is left open."""
    rows = np.repeat(np.eye(110, dtype=np.float32), 21, axis=0)
    if engine == "mixed":  # which in fixed point would prove the rest too
        monkeypatch.setattr("nearkin_service.engines.mixed.scan.fastest_products", lambda: "bfloat16")
        monkeypatch.setattr("nearkin_service.engines.ways._PANEL_ELEMENTS", 0)
    table = build_table(rows, BuildRequest((110,), "flat", 18, engine, "cpu", NOBODY), Silence())
    assert table.reserve is not None
    assert (table.reserve.ids[:, :2] >= 0).all()
    assert (table.reserve.ids[:, 2:] == -1).all()
    assert table.recomputed_rows == 0


@pytest.fixture(
    scope="module",
    params=[
        ("flat", "int16", 1),
        *(
            pytest.param(("mixed", products, places), marks=needs_mixed)
            for products in ("int16", "bfloat16")
            for places in (1, 1 << 26)
        ),
    ],
    ids=str,
)
def small_updates(request: pytest.FixtureRequest) -> Iterator[str]:
    """The engine: few classes are scanned in small tiles, hold a reserve, and are updated at any cost."""
    engine, products, places = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nearkin_service.engines.ways.AT_ONCE", 0)
        patch.setattr("nearkin_service.engines.reindexed.ByIndex.expected_cost", lambda self: 0.0)
        patch.setattr("nearkin_service.engines.flat._SMALL", 0)
        patch.setattr("nearkin_service.engines.flat._LARGE_SHARE", 0)
        if engine == "mixed":
            scan = importlib.import_module("nearkin_service.engines.mixed.scan")
            patch.setattr(scan, "fastest_products", lambda: products)
            patch.setattr("nearkin_service.engines.mixed.tiles._TILE_ROWS", 64)
            patch.setattr("nearkin_service.engines.mixed.tiles._TILE_ROWS_NARROW", 64)
            patch.setattr("nearkin_service.engines.ways._PANEL_ELEMENTS", 0)
            patch.setattr("nearkin_service.engines.mixed.cpu._SIEVE_PLACES", places)
            patch.setattr("nearkin_service.engines.mixed.updating.ByTiles.expected_cost", lambda self: 0.0)
        yield engine


def assert_known_prefix(table: BuiltTable, deeper: BuiltTable) -> None:
    """What is held in reserve is what a deeper table lists next, up to some place."""
    k = table.ids.shape[1]
    if table.reserve is None:
        return
    held = table.reserve.ids >= 0
    assert (held[:, 1:] <= held[:, :-1]).all()
    np.testing.assert_array_equal(table.reserve.ids[held], deeper.ids[:, k:][held])
    np.testing.assert_array_equal(table.reserve.scores[held], deeper.scores[:, k:][held])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_updates_of_updates(small_updates: str, data: Any) -> None:
    """Each starts from the one before and its reserve; classes come and go; rows tie in every way."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    count, size = data.draw(st.integers(4, 400)), data.draw(st.sampled_from([4, 5, 33, 64, 300]))
    kind = KINDS[data.draw(st.integers(0, len(KINDS) - 1))]
    k = min(count - 1, data.draw(st.sampled_from([1, 2, 7, 20, 60, 400])))
    with_absent = data.draw(st.booleans())

    def fresh() -> NDArray[np.float32]:
        with np.errstate(all="ignore"):
            rows = np.asarray(kind(random, random.standard_normal((count, size), dtype=np.float32)))
        rows = rows[random.integers(0, len(rows), count)]  # of some kinds there are fewer
        rows[~rows.any(axis=1) | ~np.isfinite(rows).all(axis=1), 0] = 1
        return np.asarray(np.nan_to_num(rows), np.float32)

    rows, absent = fresh(), NOBODY
    table = build_table(rows, BuildRequest((size,), "flat", k, small_updates, "cpu", absent), Silence())
    for _ in range(3):
        before, gone_before, rows = rows, absent, rows.copy()
        changed = random.permutation(count)[: int(random.uniform(0, 0.3) * count)]
        how = int(random.integers(3))
        if how == 0:
            rows[changed] = fresh()[: len(changed)]
        elif how == 1:
            rows[changed] *= 1 + np.float32(1e-7) * random.standard_normal(
                (len(changed), size), dtype=np.float32
            )
        else:
            rows[changed] = rows[random.integers(0, count, len(changed))]
        if with_absent:
            absent = np.flatnonzero(random.random(count) < 0.1)
        request = BuildRequest((size,), "flat", k, small_updates, "cpu", absent)
        since = Parent(before, table.ids, table.scores, gone_before, table.reserve)
        table = update_table(rows, request, since, Silence())
        full = build_table(rows, request, Silence())
        assert table.ids.tobytes() == full.ids.tobytes()
        assert table.scores.tobytes() == full.scores.tobytes()
        spare = 0 if table.reserve is None else table.reserve.ids.shape[1]
        deeper = BuildRequest((size,), "flat", k + spare, "flat", "cpu", absent)
        known = build_table(rows, deeper, Silence())
        assert_known_prefix(table, known)
        assert_known_prefix(full, known)
    assert_agrees(table, true_scores(rows, absent))


@needs_mixed
@pytest.mark.parametrize("products", ["int16", "bfloat16"])
@pytest.mark.parametrize("size", [40, 2053])
@pytest.mark.parametrize("groups", [0, 60])
def test_an_update_by_tiles_of_real_size(
    products: str, size: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = importlib.import_module("nearkin_service.engines.mixed.scan")
    monkeypatch.setattr(scan, "fastest_products", lambda: products)
    random = np.random.default_rng(size + groups)

    def fresh(count: int) -> NDArray[np.float32]:
        rows = random.standard_normal((count, size), dtype=np.float32)
        return rows + 2 * centres[random.integers(0, groups, count)] if groups else rows

    centres = random.standard_normal((groups, size), dtype=np.float32)
    before = fresh(3001)
    after = before.copy()
    rows = random.permutation(3001)[:550]
    after[rows] = fresh(550)
    assert assert_updates(before, after, 20, "mixed") < 550 + 300
