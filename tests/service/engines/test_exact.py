"""Engines against a float64 brute force, on rows that are hard to get right."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nearkin_service.engines import auto
from nearkin_service.engines.keys import KeyedRows

from tests.service.engines.cases import CASES
from tests.service.engines.oracle import assert_agrees, build, true_scores

needs_mixed = pytest.mark.skipif(
    auto.mixed_packages_missing() is not None, reason="nearkin-service[mixed] is not installed"
)
ENGINES = ["flat", pytest.param("mixed", marks=needs_mixed)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float64(name: str, engine: str) -> None:
    rows, k = CASES[name](np.random.default_rng(11))
    assert_agrees(build(rows, k, engine), true_scores(rows))


@needs_mixed
@pytest.mark.parametrize(
    ("products", "places", "direct", "panels"),
    [
        ("bfloat16", 1 << 26, 0, 0),
        ("int16", 1 << 26, 0, 0),
        ("bfloat16", 1, 0, 0),
        ("int16", 1, 5000, 0),
        ("int16", 1, 0, 1 << 30),
    ],
    ids=["bfloat16", "int16", "narrow sieves", "at once", "in panels"],
)
@pytest.mark.parametrize("name", CASES)
def test_engines_agree_bit_for_bit(
    name: str, products: str, places: int, direct: int, panels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever products are quickest here, where sieves overflow as among many classes, and all at once."""
    scan = importlib.import_module("nearkin_service.engines.mixed.scan")
    monkeypatch.setattr(scan, "fastest_products", lambda: products)
    monkeypatch.setattr("nearkin_service.engines.mixed.cpu._SIEVE_PLACES", places)
    monkeypatch.setattr("nearkin_service.engines.ways.AT_ONCE", direct)
    monkeypatch.setattr("nearkin_service.engines.ways._PANEL_ELEMENTS", panels)
    rows, k = CASES[name](np.random.default_rng(12))
    flat, mixed = build(rows, k, "flat"), build(rows, k, "mixed")
    np.testing.assert_array_equal(flat.ids, mixed.ids)
    np.testing.assert_array_equal(flat.scores, mixed.scores)


@needs_mixed
@pytest.mark.parametrize(("products", "size"), [("int16", 600), ("bfloat16", 600), ("bfloat16", 4)])
def test_a_table_names_torch_only_where_that_multiplied(
    products: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of short keys, which are multiplied in panels."""
    monkeypatch.setattr("nearkin_service.engines.mixed.scan.fastest_products", lambda: products)
    monkeypatch.setattr("nearkin_service.engines.ways.AT_ONCE", 0)
    table = build(np.random.default_rng(1).standard_normal((700, size), dtype=np.float32), 5, "mixed")
    assert ("torch" in table.versions) == (products == "bfloat16" and size == 600)
    assert "numba" in table.versions


@needs_mixed
@pytest.mark.parametrize("products", ["bfloat16", "int16"])
@pytest.mark.parametrize("per_row", [0, 1500, 10_000], ids=["no places", "some", "enough"])
def test_rows_of_large_clusters_get_more_places(
    per_row: int, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows move that need more than a sieve begins with; those that find no places are recomputed."""
    random = np.random.default_rng(3)
    scan = importlib.import_module("nearkin_service.engines.mixed.scan")
    monkeypatch.setattr(scan, "fastest_products", lambda: products)
    monkeypatch.setattr("nearkin_service.engines.ways._PANEL_ELEMENTS", 0)
    sieve_places = lambda count, k: (128, count * per_row)  # noqa: E731
    monkeypatch.setattr("nearkin_service.engines.mixed.cpu.sieve_places", sieve_places)
    sizes = [1200, 900, 300, 40]
    centres = np.repeat(random.standard_normal((4, 64)), sizes, axis=0)
    rows = (centres + 1e-4 * random.standard_normal(centres.shape)).astype(np.float32)
    flat, mixed = build(rows, 10, "flat"), build(rows, 10, "mixed")
    np.testing.assert_array_equal(flat.ids, mixed.ids)
    np.testing.assert_array_equal(flat.scores, mixed.scores)
    least, most = {0: (2300, 2400), 1500: (1, 2299), 10_000: (0, 0)}[per_row]
    assert least <= mixed.recomputed_rows <= most


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("absent_share", [0.01, 0.5, 0.99])
def test_absent_classes_are_nobodys_neighbour(engine: str, absent_share: float) -> None:
    random = np.random.default_rng(3)
    rows = random.standard_normal((1200, 20), dtype=np.float32)
    absent = np.flatnonzero(random.random(1200) < absent_share)
    rows[absent] = np.nan
    assert_agrees(build(rows, 16, engine, absent=absent), true_scores(rows, absent))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("width", [4, 2048])
@pytest.mark.parametrize("present", [0, 1, 2])
def test_hardly_anybody_left_to_compare(present: int, width: int, engine: str) -> None:
    table = build(np.full((6, width), 2, np.float32), 3, engine, absent=np.arange(present, 6))
    if present == 2:
        assert table.ids[:2].tolist() == [[1, -1, -1], [0, -1, -1]]
        return
    assert (table.ids == -1).all()
    assert np.isneginf(table.scores).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_pooled_is_the_mean_over_locations(engine: str) -> None:
    rows = np.random.default_rng(5).standard_normal((1100, 24 * 6), dtype=np.float32)
    table = build(rows, 10, engine, key="pooled", shape=(24, 3, 2))
    assert_agrees(table, true_scores(rows, shape=(24, 3, 2)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_small_integers_tie_in_every_way(data: Any) -> None:
    count = data.draw(st.integers(2, 60))
    size = data.draw(st.integers(1, 6))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows = random.integers(-2, 3, (count, size)).astype(np.float32)
    absent = np.flatnonzero(~rows.any(axis=1))
    k = data.draw(st.integers(1, count - 1))
    assert_agrees(build(rows, k, "flat", absent=absent), true_scores(rows, absent))


@pytest.fixture(scope="module", params=["at once", "scanned"])
def small_tables(request: pytest.FixtureRequest) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "scanned":
            patch.setattr("nearkin_service.engines.ways.AT_ONCE", 0)
            patch.setattr("nearkin_service.engines.ways._PANEL_ELEMENTS", 0)
        yield request.param


@needs_mixed
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_mixed_on_any_shape(small_tables: str, data: Any) -> None:
    count = data.draw(st.integers(2, 700))
    size = data.draw(st.integers(1, 90))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    groups = data.draw(st.integers(1, count))
    spread = data.draw(st.sampled_from([0.0, 1e-7, 1e-4, 1e-2, 1.0]))
    centres = random.standard_normal((groups, size))
    rows = centres[random.integers(0, groups, count)] + spread * random.standard_normal((count, size))
    k = data.draw(st.integers(1, count - 1))
    rows32 = rows.astype(np.float32)
    assert_agrees(build(rows32, k, "mixed"), true_scores(rows32))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_key_does_not_depend_on_its_rows_place(data: Any) -> None:
    count, size = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 7, 300, 8193, 9000, 25088]))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows = random.standard_normal((count, size)).astype(np.float32)
    source = KeyedRows(rows, (size,), "flat", np.empty(0, np.int64))
    together = source.keys_of(rows, np.arange(count))
    start = data.draw(st.integers(0, count - 1))
    np.testing.assert_array_equal(source.keys_of(rows[start : start + 3], np.arange(3)), together[start:][:3])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_rows_give_the_same_bytes(engine: str) -> None:
    rows, k = CASES["clustered"](np.random.default_rng(4))
    first, second = build(rows, k, engine), build(rows.copy(), k, engine)
    assert first.ids.tobytes() == second.ids.tobytes()
    assert first.scores.tobytes() == second.scores.tobytes()


def test_a_permutation_of_classes_permutes_the_scores() -> None:
    rows, k = CASES["unstructured"](np.random.default_rng(8))
    order = np.random.default_rng(9).permutation(len(rows))
    np.testing.assert_array_equal(build(rows[order], k).scores, build(rows, k).scores[order])
