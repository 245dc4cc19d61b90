"""Row sets behave like Python's sets of numbers, whatever the ranges."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from nearkin_service.ranges import RowRange, RowSet

numbers = st.frozensets(st.integers(0, 60), max_size=40)
bounds = st.tuples(st.integers(0, 61), st.integers(0, 61)).map(sorted)


def row_set(ids: frozenset[int]) -> RowSet:
    return RowSet.from_ids(np.array(sorted(ids), np.int64))


def as_set(rows: RowSet) -> set[int]:
    """Its numbers, once it is certain that its ranges are ascending, disjoint and never touch."""
    assert (rows.starts < rows.stops).all()
    assert (rows.stops[:-1] < rows.starts[1:]).all()
    assert len(rows) == len(rows.ids())
    return set(rows.ids().tolist())


@given(numbers, numbers)
def test_union_and_difference(a: frozenset[int], b: frozenset[int]) -> None:
    assert as_set(row_set(a)) == a
    assert as_set(row_set(a).union(row_set(b))) == a | b
    assert as_set(row_set(a).minus(row_set(b))) == a - b
    assert row_set(a).union(row_set(b)) == row_set(b).union(row_set(a))


@given(numbers, bounds)
def test_parts_and_complements(a: frozenset[int], bound: list[int]) -> None:
    inside = set(range(*bound))
    assert as_set(row_set(a).within(*bound)) == a & inside
    assert as_set(row_set(a).complement(*bound)) == inside - a


@given(numbers, st.lists(st.integers(0, 70)))
def test_membership(a: frozenset[int], asked: list[int]) -> None:
    assert row_set(a).contains(np.array(asked, np.int64)).tolist() == [i in a for i in asked]


@given(st.lists(bounds))
def test_any_ranges_in_any_order(ranges: list[list[int]]) -> None:
    starts, stops = np.array(ranges, np.int64).reshape(-1, 2).T
    assert as_set(RowSet.from_arrays(starts, stops)) == {n for r in ranges for n in range(*r)}


@given(st.tuples(bounds, bounds))
def test_overlap(pair: tuple[list[int], list[int]]) -> None:
    a, b = (RowRange(*each) for each in pair)
    if len(a) and len(b):
        assert a.overlaps(b) == bool(set(range(a.start, a.stop)) & set(range(b.start, b.stop)))


@given(numbers, numbers, st.permutations(range(61)))
def test_common_rows_are_counted(a: frozenset[int], b: frozenset[int], order: list[int]) -> None:
    assert row_set(a).overlap(row_set(b)) == len(a & b)
    shuffled = [n for n in order if n in a] * 2
    assert RowSet.from_ids(np.array(shuffled, np.int64)) == row_set(a)
