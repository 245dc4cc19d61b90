"""An update by searching an index: the changed rows for every unchanged one, and every row for some.

For engine `flat`, and wherever there are few classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.canonical import EMPTY, ranks, steps_of
from nearkin_service.engines.complete import Queries
from nearkin_service.engines.contract import BuildMonitor
from nearkin_service.engines.flat import FlatIndex, filled_index, nearest
from nearkin_service.engines.incremental import Change, Depth
from nearkin_service.engines.keys import KeyedRows
from nearkin_service.engines.pacing import BlockSize, Pace, blocks


class ByIndex:
    """One update; `full_build` is a full build's time over that of searching for all rows like this."""

    def __init__(
        self, full_build: float, source: KeyedRows, change: Change, depth: Depth, monitor: BuildMonitor
    ) -> None:
        self._full_build = full_build
        self._change, self._depth, self._monitor = change, depth, monitor
        self._index = filled_index(source, "cpu", monitor)
        self._news = FlatIndex(len(change.moved), source.key_size, "cpu")
        self._news.keys_MD[:] = self._index.keys_MD[change.moved]

    def expected_cost(self) -> float:
        """Over a full build's."""
        few = self._change.kept[self._change.sample()]
        doubtful = 1 - float(self._carried(few)[1].mean()) if len(few) else 0.0
        kept, moved = len(self._change.kept), len(self._change.moved)
        everyone = max(1, kept + moved)
        return (moved * kept / everyone + moved + doubtful * kept) / everyone / self._full_build

    def run(self) -> tuple[NDArray[np.int64], int]:
        """Ranks int64 [M, K], and how many rows were searched in full."""
        kept, count = self._change.kept, len(self._change.present)
        ranks_MK = np.full((count, self._depth.all), EMPTY)
        certain = np.zeros(count, bool)
        ranks_MK[kept], certain[kept] = self._carried(kept)
        again = np.flatnonzero(~certain)
        self._search(again, ranks_MK)
        return ranks_MK, len(again)

    def _carried(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        return self._change.carried(rows, self._entrants(rows), self._depth)

    def _entrants(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ranks int64 [U, C] of the changed rows that are best for each unchanged one."""
        moved = self._change.moved
        wanted = min(self._depth.all, len(moved))
        entrants_UC = np.full((len(rows), wanted), EMPTY)
        if not wanted:
            return entrants_UC
        pace = Pace(self._monitor, "entrants", len(rows))
        for some in blocks(len(rows), BlockSize(1024, 1 << 14), pace):
            keys = self._index.keys_MD[rows[some]]
            queries = Queries(keys, np.full(len(keys), -1))
            found, _ = nearest(self._news, queries, wanted, self._monitor)
            empty = found == EMPTY
            entrants = ranks(steps_of(found), moved[np.where(empty, 0, found & 0xFFFFFFFF)])
            entrants_UC[some] = np.where(empty, EMPTY, entrants)
        return entrants_UC

    def _search(self, rows: NDArray[np.int64], ranks_MK: NDArray[np.int64]) -> None:
        """Search some rows in full, in place."""
        pace = Pace(self._monitor, "search", len(rows))
        for some in blocks(len(rows), BlockSize(256, 1 << 14), pace):
            own = rows[some]
            queries = Queries(self._index.keys_MD[own], own)
            k, spare = self._depth.k, self._depth.spare
            ranks_MK[own], _ = nearest(self._index, queries, k, self._monitor, spare)
