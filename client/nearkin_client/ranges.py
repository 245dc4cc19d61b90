"""Sets of rows as ascending, disjoint `(start, stop)` ranges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

Range = tuple[int, int]


def normalised(ranges: Iterable[Range]) -> list[Range]:
    """Ascending, disjoint and without gaps of zero between them."""
    merged: list[Range] = []
    for start, stop in sorted(each for each in ranges if each[0] < each[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def subtract(ranges: Iterable[Range], taken: Iterable[Range]) -> list[Range]:
    """The rows of `ranges` that are not in `taken`."""
    cuts = normalised(taken)
    left: list[Range] = []
    passed = 0
    for begin, stop in normalised(ranges):
        start = begin
        while passed < len(cuts) and cuts[passed][1] <= start:
            passed += 1
        for lo, hi in islice(cuts, passed, None):
            if lo >= stop:
                break
            if start < lo:
                left.append((start, lo))
            start = max(start, hi)
        if start < stop:
            left.append((start, stop))
    return left


def intersect(ranges: Iterable[Range], others: Iterable[Range]) -> list[Range]:
    """The rows that are in both."""
    ranges = normalised(ranges)
    return subtract(ranges, subtract(ranges, others))


def first(ranges: Iterable[Range], count: int) -> list[Range]:
    """The first `count` rows."""
    found: list[Range] = []
    for start, stop in ranges:
        if count <= 0:
            break
        found.append((start, min(stop, start + count)))
        count -= stop - start
    return found


def pieces(ranges: Iterable[Range], size: int) -> Iterator[Range]:
    """The same rows, cut into pieces of at most `size`."""
    for start, stop in ranges:
        for lo in range(start, stop, size):
            yield lo, min(lo + size, stop)


def total(ranges: Iterable[Range]) -> int:
    """How many rows."""
    return sum(stop - start for start, stop in ranges)
