"""A table from its parent's, when few rows changed: bit-identical with a full build.

An unchanged row keeps those of its neighbours that did not change, and may gain changed ones; whoever it
did not list before scores no better than its old k-th. If k of the merged ones are at least that good, they
are the k best; if not, the row is searched again like the changed ones. Canonical scores make the result the
same bytes.

Dimension letters: N classes, M present classes, U unchanged rows, V changed and present rows, k neighbours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.canonical import EMPTY, STEPS, best, ranks, steps_of
from nearkin_service.engines.complete import Queries
from nearkin_service.engines.contract import BuildMonitor, BuiltTable, Parent
from nearkin_service.engines.devices import faiss_version
from nearkin_service.engines.flat import FlatIndex, filled_index, spread
from nearkin_service.engines.keys import KeyedRows
from nearkin_service.engines.pacing import BlockSize, Pace, blocks

log = logging.getLogger("nearkin.engines")

_COMPARED_BYTES = 1 << 24
_SAMPLED = 256


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
    differ = (as_bytes(source.rows[few]) != as_bytes(parent.rows[few])).any(axis=1)
    if (differ & here[few] & there[few]).sum() > max(16, 2 * _SAMPLED * most // count):
        return None
    step = max(1, _COMPARED_BYTES // max(1, source.rows[:1].nbytes))
    for start in range(0, count, step):
        monitor.check()
        some = slice(start, start + step)
        differ = (as_bytes(source.rows[some]) != as_bytes(parent.rows[some])).any(axis=1)
        changed[some] |= differ & here[some] & there[some]
        if changed.sum() > most:
            return None
    return np.flatnonzero(changed)


def as_bytes(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """Rows as they lie in memory, so that NaN equals itself and -0.0 differs from 0.0."""
    return np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)


def fits(source: KeyedRows, k: int, parent: Parent) -> bool:
    """Whether the parent's table can be carried over at all."""
    same_rows = parent.rows.shape == source.rows.shape and parent.rows.dtype == source.rows.dtype
    return same_rows and parent.ids.shape == (len(source.rows), k) and source.key != "qaconv"


Nearest = Callable[[FlatIndex, Queries, int, BuildMonitor], tuple[NDArray[np.int64], int]]
"""How some rows are searched: exact ranks int64 [Q, k], and how many rows needed the second pass."""


@dataclass(frozen=True, slots=True)
class Means:
    """How an engine searches rows, and its full build's time over that of searching all rows like this."""

    nearest: Nearest
    full_build: float


def update(
    source: KeyedRows, k: int, parent: Parent, means: Means, monitor: BuildMonitor
) -> BuiltTable | None:
    """The exact table of `source` from its parent's, on the CPU; None if a full build takes no longer."""
    times = [time.monotonic()]
    changed = changed_classes(source, parent, int(means.full_build * len(source.rows) / 2), monitor)
    if changed is None:
        return None
    times.append(time.monotonic())
    present = source.present()
    index = filled_index(source, "cpu", monitor)
    times.append(time.monotonic())
    update = _Update(index, present, (parent, changed), means.nearest, monitor)
    if update.expected_cost(k) > means.full_build:
        return None
    ranks_Mk, searched = update.run(k)
    ids, scores = spread(ranks_Mk, present, len(source.rows))
    times.append(time.monotonic())
    log.info("updated from the parent: %d changed, %d rows searched in full", len(changed), searched)
    seconds = dict(zip(("compare", "keys", "update"), np.diff(times).tolist(), strict=True))
    versions = {"faiss": faiss_version(), "numpy": np.__version__}
    return BuiltTable(ids, scores, "flat", "cpu", True, searched, seconds, versions)


class _Update:
    """One update; rows are named by their positions among the present classes."""

    def __init__(
        self,
        index: FlatIndex,
        present: NDArray[np.int64],
        since: tuple[Parent, NDArray[np.int64]],
        nearest: Nearest,
        monitor: BuildMonitor,
    ) -> None:
        parent, changed = since
        self._index, self._present, self._parent = index, present, parent
        self._nearest, self._monitor = nearest, monitor
        self._is_changed = np.zeros(len(parent.ids), bool)
        self._is_changed[changed] = True
        self._kept = np.flatnonzero(~self._is_changed[present])
        self._moved = np.flatnonzero(self._is_changed[present])
        self._news = FlatIndex(len(self._moved), index.keys_MD.shape[1], "cpu")
        self._news.keys_MD[:] = index.keys_MD[self._moved]

    def expected_cost(self, k: int) -> float:
        """In products of all rows with all rows; how many rows must be searched again, a sample tells."""
        few = self._kept[:: max(1, len(self._kept) // _SAMPLED)]
        doubtful = 1 - float(self._carried(few, k)[1].mean()) if len(few) else 0.0
        kept, moved = len(self._kept), len(self._moved)
        everyone = max(1, kept + moved)
        return (moved * kept / everyone + moved + doubtful * kept) / everyone

    def run(self, k: int) -> tuple[NDArray[np.int64], int]:
        """Ranks int64 [M, k], and how many rows were searched in full."""
        ranks_Mk = np.full((len(self._present), k), EMPTY)
        certain = np.zeros(len(self._present), bool)
        ranks_Mk[self._kept], certain[self._kept] = self._carried(self._kept, k)
        again = np.flatnonzero(~certain)
        self._search(again, ranks_Mk)
        return ranks_Mk, len(again)

    def _carried(self, rows: NDArray[np.int64], k: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Ranks int64 [U, k] of unchanged rows from the parent's and their entrants; which are certain."""
        old, ids = _old_ranks(self._parent, self._present, rows), self._parent.ids[self._present[rows]]
        stayed = np.where(self._is_changed[ids] | (ids < 0), EMPTY, old)
        entrants = self._entrants(rows, k)
        merged = best(np.concatenate([stayed, entrants], axis=1), k)
        return merged, merged[:, -1] <= old[:, -1]

    def _entrants(self, rows: NDArray[np.int64], k: int) -> NDArray[np.int64]:
        """Ranks int64 [U, k'] of the changed rows that are best for each unchanged one."""
        wanted = min(k, len(self._moved))
        entrants_Uk = np.full((len(rows), wanted), EMPTY)
        if not wanted:
            return entrants_Uk
        pace = Pace(self._monitor, "entrants", len(rows))
        for some in blocks(len(rows), BlockSize(1024, 1 << 14), pace):
            keys = self._index.keys_MD[rows[some]]
            queries = Queries(keys, np.full(len(keys), -1))
            found, _ = self._nearest(self._news, queries, wanted, self._monitor)
            empty = found == EMPTY
            entrants = ranks(steps_of(found), self._moved[np.where(empty, 0, found & 0xFFFFFFFF)])
            entrants_Uk[some] = np.where(empty, EMPTY, entrants)
        return entrants_Uk

    def _search(self, rows: NDArray[np.int64], ranks_Mk: NDArray[np.int64]) -> None:
        """Search some rows in full, in place."""
        pace = Pace(self._monitor, "search", len(rows))
        for some in blocks(len(rows), BlockSize(256, 1 << 14), pace):
            own = rows[some]
            queries = Queries(self._index.keys_MD[own], own)
            ranks_Mk[own], _ = self._nearest(self._index, queries, ranks_Mk.shape[1], self._monitor)


def _old_ranks(parent: Parent, present: NDArray[np.int64], kept: NDArray[np.int64]) -> NDArray[np.int64]:
    """The parent's ranks of the unchanged rows, with positions among the classes that are present now."""
    position = np.full(len(parent.ids), -1)
    position[present] = np.arange(len(present))
    ids = parent.ids[present[kept]]
    steps = np.rint(np.where(ids < 0, 0.0, parent.scores[present[kept]].astype(np.float64)) * STEPS)
    return ranks(steps.astype(np.int64), np.where(ids < 0, -1, np.maximum(position[ids], 0)))
