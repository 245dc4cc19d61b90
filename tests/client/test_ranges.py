"""Row ranges behave as the sets of rows that they stand for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from nearkin_client import ranges

bounds = st.integers(0, 40)
some_ranges = st.lists(st.tuples(bounds, bounds), max_size=8)


def rows(of: list[ranges.Range]) -> set[int]:
    return {row for start, stop in of for row in range(start, stop)}


def is_normal(of: list[ranges.Range]) -> bool:
    flat = [edge for each in of for edge in each]
    return flat == sorted(set(flat))


@given(some_ranges, some_ranges)
def test_subtract_and_intersect_are_those_of_sets(a: list[ranges.Range], b: list[ranges.Range]) -> None:
    assert rows(ranges.subtract(a, b)) == rows(a) - rows(b)
    assert rows(ranges.intersect(a, b)) == rows(a) & rows(b)
    assert is_normal(ranges.subtract(a, b))
    assert is_normal(ranges.normalised(a))


@given(some_ranges, st.integers(0, 50))
def test_first_takes_the_lowest_rows(a: list[ranges.Range], count: int) -> None:
    normal = ranges.normalised(a)
    assert sorted(rows(ranges.first(normal, count))) == sorted(rows(a))[:count]


@given(some_ranges, st.integers(1, 9))
def test_pieces_are_the_same_rows_in_small_parts(a: list[ranges.Range], size: int) -> None:
    normal = ranges.normalised(a)
    cut = list(ranges.pieces(normal, size))
    assert [row for each in cut for row in range(*each)] == sorted(rows(a))
    assert all(0 < stop - start <= size for start, stop in cut)
    assert ranges.total(cut) == len(rows(a))
