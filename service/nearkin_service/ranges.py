"""Sets of row numbers, kept as disjoint ascending ranges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
_FEW = 8


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows start <= r < stop."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def overlaps(self, other: RowRange) -> bool:
        """Whether any row is in both."""
        return self.start < other.stop and other.start < self.stop


@dataclass(frozen=True, slots=True, eq=False)
class RowSet:
    """An immutable set of row numbers. `starts` and `stops` are ascending and never touch each other.

    There may be millions of ranges: nothing here loops over them in Python but `__iter__`.
    """

    starts: Int64s
    stops: Int64s
    _count: int = field(init=False, repr=False)  # asked for all the time

    def __post_init__(self) -> None:
        object.__setattr__(self, "_count", int((self.stops - self.starts).sum()))

    @staticmethod
    def empty() -> RowSet:
        return RowSet(np.empty(0, np.int64), np.empty(0, np.int64))

    @staticmethod
    def of(start: int, stop: int) -> RowSet:
        """Rows start <= r < stop."""
        if start >= stop:
            return RowSet.empty()
        return RowSet(np.array([start], np.int64), np.array([stop], np.int64))

    @staticmethod
    def from_ids(ids: Int64s) -> RowSet:
        """These rows, in any order, repeated or not."""
        if not len(ids):
            return RowSet.empty()
        if not (ids[1:] >= ids[:-1]).all():
            ids = np.sort(ids)
        ends = np.flatnonzero(ids[1:] > ids[:-1] + 1)
        return RowSet(ids[np.append(0, ends + 1)], ids[np.append(ends, -1)] + 1)

    @staticmethod
    def from_arrays(starts: Int64s, stops: Int64s) -> RowSet:
        """The union of the ranges, which may be empty, overlap and come in any order."""
        filled = starts < stops
        starts, stops = starts[filled], stops[filled]
        order = np.argsort(starts, kind="stable")
        starts, reach = starts[order], np.maximum.accumulate(stops[order])
        opens = np.ones(len(starts), bool)
        opens[1:] = starts[1:] > reach[:-1]
        closes = np.append(opens[1:], True)[: len(starts)]
        return RowSet(starts[opens], reach[closes])

    def union(self, other: RowSet) -> RowSet:
        if not self.ranges or not other.ranges:
            return self if self.ranges else other
        return RowSet.from_arrays(
            np.concatenate([self.starts, other.starts]), np.concatenate([self.stops, other.stops])
        )

    def complement(self, start: int, stop: int) -> RowSet:
        """The rows of start <= r < stop that are not in this set."""
        if not self.ranges:
            return RowSet.of(start, stop)
        inside = (self.stops > start) & (self.starts < stop)
        begins = np.concatenate([[start], np.maximum(self.stops[inside], start)])
        ends = np.concatenate([np.minimum(self.starts[inside], stop), [stop]])
        return RowSet.from_arrays(begins, ends)

    def within(self, start: int, stop: int) -> RowSet:
        """The rows of this set with start <= r < stop."""
        low, high = np.searchsorted(self.stops, start, side="right"), np.searchsorted(self.starts, stop)
        if low >= high or start >= stop:
            return RowSet.empty()
        return RowSet(np.maximum(self.starts[low:high], start), np.minimum(self.stops[low:high], stop))

    def minus(self, other: RowSet) -> RowSet:
        if not len(self):
            return self
        start, stop = int(self.starts[0]), int(self.stops[-1])
        return self.complement(start, stop).union(other.within(start, stop)).complement(start, stop)

    def overlap(self, other: RowSet) -> int:
        """How many rows are in both."""
        few, many = (self, other) if self.ranges < other.ranges else (other, self)
        if few.ranges <= _FEW:
            return sum(len(many.within(each.start, each.stop)) for each in few)
        return len(self) - len(self.minus(other))

    def contains(self, ids: Int64s) -> NDArray[np.bool_]:
        """For each id whether it is in the set."""
        place = np.searchsorted(self.starts, ids, side="right") - 1
        found: NDArray[np.bool_] = place >= 0
        found[found] = ids[found] < self.stops[place[found]]
        return found

    def ids(self) -> Int64s:
        """Every row number, ascending."""
        lengths = self.stops - self.starts
        before = np.cumsum(lengths) - lengths
        return np.repeat(self.starts - before, lengths) + np.arange(len(self), dtype=np.int64)

    @property
    def ranges(self) -> int:
        """How many ranges it takes."""
        return len(self.starts)

    @property
    def first(self) -> RowRange | None:
        """The lowest range."""
        return RowRange(int(self.starts[0]), int(self.stops[0])) if self.ranges else None

    def __iter__(self) -> Iterator[RowRange]:
        return (RowRange(a, b) for a, b in zip(self.starts.tolist(), self.stops.tolist(), strict=True))

    def __len__(self) -> int:
        return self._count

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RowSet):
            return NotImplemented
        return np.array_equal(self.starts, other.starts) and np.array_equal(self.stops, other.stops)

    __hash__ = None  # type: ignore[assignment]
