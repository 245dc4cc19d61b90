"""A table from its parent's, when few rows changed: bit-identical with a full build.

The parent's table and its reserve list an unchanged row's best neighbours up to some last one; whoever is not
listed ranks below that. So the listed ones that did not change, and the changed ones that rank no worse than
the last, are all that do. If they are k, they are the row's k best, and the rest of them its reserve; if not,
the row is searched again like the changed ones. Canonical scores make the result the same bytes.

Dimension letters: N classes, M present classes, U unchanged rows, V changed and present rows, k neighbours,
K neighbours and what is held in reserve.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.canonical import EMPTY, STEPS, best, ranks
from nearkin_service.engines.contract import BuildMonitor, BuiltTable, Parent
from nearkin_service.engines.flat import spread
from nearkin_service.engines.installed import faiss_version
from nearkin_service.engines.keys import KeyedRows
from nearkin_service.engines.pacing import Pace
from nearkin_service.engines.workers import in_threads

log = logging.getLogger("nearkin.engines")

_COMPARED_BYTES = 1 << 22
_SAMPLED = 256
_MERGED_ROWS = 1 << 12


def changed_classes(
    source: KeyedRows, parent: Parent, most: int, monitor: BuildMonitor
) -> NDArray[np.int64] | None:
    """Ids of the classes whose row's bytes, or whose absence, differ from the parent's; ascending.

    None as soon as there are more than `most`, of which a few rows here and there give an early notice.
    """
    count = len(source.rows)
    here, there = np.ones(count, bool), np.ones(count, bool)
    here[source.absent] = False
    there[parent.absent] = False
    changed = here != there
    few = slice(0, count, max(1, count // _SAMPLED))
    differ = (as_bits(source.rows[few]) != as_bits(parent.rows[few])).any(axis=1)
    if (differ & here[few] & there[few]).sum() > max(16, 2 * _SAMPLED * most // count):
        return None
    pace = Pace(monitor, "compare", count)
    step = max(1, _COMPARED_BYTES // max(1, source.rows[:1].nbytes))

    def compare(start: int) -> None:
        some = slice(start, start + step)
        differ = (as_bits(source.rows[some]) != as_bits(parent.rows[some])).any(axis=1)
        changed[some] |= differ & here[some] & there[some]

    in_threads(compare, range(0, count, step), lambda done: pace.done(done * step))
    return np.flatnonzero(changed) if changed.sum() <= most else None


def as_bits(rows: NDArray[Any]) -> NDArray[Any]:
    """Rows as they lie in memory, so that NaN equals itself and -0.0 differs from 0.0."""
    rows = np.ascontiguousarray(rows)
    row_bytes = rows[:1].nbytes
    return rows.view(np.uint64 if row_bytes % 8 == 0 else np.uint8).reshape(len(rows), -1)


def fits(source: KeyedRows, k: int, parent: Parent) -> bool:
    """Whether the parent's table can be carried over at all."""
    same_rows = parent.rows.shape == source.rows.shape and parent.rows.dtype == source.rows.dtype
    return same_rows and parent.ids.shape == (len(source.rows), k) and source.key != "qaconv"


@dataclass(frozen=True, slots=True)
class Depth:
    """Neighbours that a table publishes, and those that it holds in reserve where that costs no search."""

    k: int
    spare: int

    @property
    def all(self) -> int:
        return self.k + self.spare


class Change:
    """What became of a parent's classes; rows are named by their positions among the present ones.

    Attributes:
        present: int64 [M], the ids of the classes that are present now.
        kept: int64 [U], the rows that did not change.
        moved: int64 [V], the others.
    """

    def __init__(self, parent: Parent, changed: NDArray[np.int64], present: NDArray[np.int64]) -> None:
        self._parent, self.present = parent, present
        self._is_changed = np.zeros(len(parent.ids), bool)
        self._is_changed[changed] = True
        self._position = np.full(len(parent.ids), -1)
        self._position[present] = np.arange(len(present))
        self.kept = np.flatnonzero(~self._is_changed[present])
        self.moved = np.flatnonzero(self._is_changed[present])

    def sample(self) -> NDArray[np.int64]:
        """Places here and there among the unchanged rows."""
        return np.arange(0, len(self.kept), max(1, len(self.kept) // _SAMPLED))

    def carried(
        self, rows: NDArray[np.int64], entrants_UC: NDArray[np.int64], depth: Depth
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Ranks int64 [U, K] of unchanged rows, as far as they are known; which of them are k at least.

        `entrants_UC` is the ranks of changed rows, among them all that rank no worse than `last_known`.
        """
        result_UK, enough = np.empty((len(rows), depth.all), np.int64), np.empty(len(rows), bool)

        def merge(start: int) -> None:
            some = slice(start, start + _MERGED_ROWS)
            stayed, last = self._known(rows[some])
            merged = best(np.concatenate([stayed, entrants_UC[some]], axis=1), depth.all)
            result_UK[some] = np.where(merged > last[:, None], EMPTY, merged)
            enough[some] = result_UK[some, depth.k - 1] <= last

        in_threads(merge, range(0, len(rows), _MERGED_ROWS))
        return result_UK, enough

    def last_known(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Per unchanged row the rank up to which the parent lists everybody; `EMPTY` if it lists all."""
        return self._known(rows)[1]

    def _known(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ranks of the listed neighbours that did not change, and `last_known`."""
        parent, own = self._parent, self.present[rows]
        ids, scores = parent.ids[own], parent.scores[own]
        k = ids.shape[1]
        if parent.reserve is not None:
            ids = np.concatenate([ids, parent.reserve.ids[own]], axis=1)
            scores = np.concatenate([scores, parent.reserve.scores[own]], axis=1)
        steps = np.rint(np.where(ids < 0, 0.0, scores.astype(np.float64)) * STEPS).astype(np.int64)
        # The place among ties of one that is gone is not known any more: take the first.
        listed = ranks(steps, np.where(ids < 0, -1, np.maximum(self._position[ids], 0)))
        count = (ids >= 0).sum(axis=1)
        last = np.take_along_axis(listed, np.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        stayed = np.where(self._is_changed[ids], EMPTY, listed)
        return stayed, np.where(count < k, EMPTY, last)


class Updating(Protocol):
    """One update by some engine."""

    def expected_cost(self) -> float:
        """The time it will take over a full build's; how many rows must be searched, a sample tells."""

    def run(self) -> tuple[NDArray[np.int64], int]:
        """Ranks int64 [M, K], and how many rows were searched in full."""


@dataclass(frozen=True, slots=True)
class Means:
    """How an engine updates, and the share of changed rows beyond which it does not try."""

    begin: Callable[[KeyedRows, Change, Depth, BuildMonitor], Updating]
    most_changed: float


def update(
    source: KeyedRows, depth: Depth, parent: Parent, means: Means, monitor: BuildMonitor
) -> BuiltTable | None:
    """The exact table [N, K] of `source` from its parent's, on the CPU; None if a full build takes no longer.

    Of the places in reserve, those are empty of which nothing is known.
    """
    times = [time.monotonic()]
    changed = changed_classes(source, parent, int(means.most_changed * len(source.rows)), monitor)
    if changed is None:
        return None
    times.append(time.monotonic())
    change = Change(parent, changed, source.present())
    updating = means.begin(source, change, depth, monitor)
    times.append(time.monotonic())
    if updating.expected_cost() > 1:
        return None
    ranks_MK, searched = updating.run()
    ids, scores = spread(ranks_MK, change.present, len(source.rows))
    times.append(time.monotonic())
    log.info("updated from the parent: %d changed, %d rows searched in full", len(changed), searched)
    seconds = dict(zip(("compare", "keys", "update"), np.diff(times).tolist(), strict=True))
    versions = {"faiss": faiss_version(), "numpy": np.__version__}
    return BuiltTable(ids, scores, "flat", "cpu", True, searched, seconds, versions)
