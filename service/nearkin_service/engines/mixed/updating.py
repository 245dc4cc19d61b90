"""An update by tiles: those with changed rows are multiplied, each once, and serve both their sides.

The keys lie in another order here, the changed ones first, so that they fill as few blocks as they can. Ranks
hold names, which are positions among the present classes: ties go to the lower of those.

An unchanged row's sieve begins with a limit. What scores less than the last neighbour that the parent lists
for it is not wanted, since of the unchanged rows, too, it is not known which they are.

Dimension letters: M keys, P keys padded to whole blocks, U unchanged rows, V changed ones, D elements of a
key, K neighbours and what is held in reserve.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.canonical import EMPTY, STEPS, steps_of
from nearkin_service.engines.complete import Queries
from nearkin_service.engines.contract import BuildMonitor
from nearkin_service.engines.incremental import Change, Depth
from nearkin_service.engines.keys import KeyedRows, fill_keys
from nearkin_service.engines.mixed.cpu import search_again, sieve_places
from nearkin_service.engines.mixed.held import KeptKeys
from nearkin_service.engines.mixed.panels import search_in_panels
from nearkin_service.engines.mixed.products import aligned
from nearkin_service.engines.mixed.quickest import fastest_products
from nearkin_service.engines.mixed.rerank import Reranking, cut_at
from nearkin_service.engines.mixed.scan import Start, scan, tile_keys
from nearkin_service.engines.mixed.values import floor_of, limits_below

_ROW_BY_ROW = {"int16": 0.28, "bfloat16": 0.27}  # a full build's time, over that of searching row by row
_BESIDE_TILES = 0.2  # of a full build's time


class ByTiles:
    """One update."""

    def __init__(self, source: KeyedRows, change: Change, depth: Depth, monitor: BuildMonitor) -> None:
        self._change, self._depth, self._monitor = change, depth, monitor
        self._names_M = np.concatenate([change.moved, change.kept])
        self._changed = len(change.moved)
        self._keys_MD = aligned((len(self._names_M), source.key_size), np.float32)
        fill_keys(self._keys_MD, source, change.present[self._names_M], monitor)

    def expected_cost(self) -> float:
        """Over a full build's: tiles with changed rows, and the rows that must be searched one by one."""
        change, V = self._change, self._changed
        share = V / max(1, len(self._names_M))
        few = change.sample()
        queries = Queries(self._keys_MD[V + few], np.full(len(few), -1))
        entrants, _ = search_in_panels(
            self._keys_MD[:V], queries, self._depth.all, self._monitor, self._names_M[:V]
        )
        _, enough = change.carried(change.kept[few], entrants, self._depth)
        doubtful = 1 - float(enough.mean()) if len(few) else 0.0
        tiles = _BESIDE_TILES + (1 - _BESIDE_TILES) * share * (2 - share)
        return tiles + doubtful * (1 - share) / _ROW_BY_ROW[fastest_products()]

    def run(self) -> tuple[NDArray[np.int64], int]:
        """Ranks int64 [M, K], and how many rows were searched in full."""
        ranks_MK = np.full((len(self._names_M), self._depth.all), EMPTY)
        if not len(ranks_MK):
            return ranks_MK, 0
        ranks_MK = self._from_tiles()
        redo = np.flatnonzero(ranks_MK[:, self._depth.k - 1] == EMPTY)
        search_again(redo, self._keys_MD, ranks_MK, self._monitor, self._names_M)
        in_order_MK = np.empty_like(ranks_MK)
        in_order_MK[self._names_M] = ranks_MK
        return in_order_MK, self._changed + int((redo >= self._changed).sum())

    def _from_tiles(self) -> NDArray[np.int64]:
        """Ranks int64 [M, K] that are proved; of rows that must be searched, the k-th is `EMPTY`."""
        change, V, every = self._change, self._changed, self._depth.all
        keys = tile_keys(self._keys_MD, self._monitor)
        last = change.last_known(change.kept)
        errors_P = keys.errors
        limits = np.full(len(errors_P), floor_of(keys.rounding))
        kept = slice(V, len(self._names_M))
        # less the step that rounding may have added; of those that lack nobody, every changed row is wanted
        least = np.where(last == EMPTY, -2.0, (steps_of(last) - 1) / STEPS)
        limits[kept] = limits_below(least, errors_P[kept], keys.rounding)
        start = Start(limits, math.ceil(V / keys.block))
        sieve = scan(keys, every, sieve_places(len(self._keys_MD), every), self._monitor, start)
        ranks_MK, reach_M = Reranking(
            KeptKeys(self._keys_MD), sieve, every, self._monitor, self._names_M
        ).run()
        entrants_UC = self._only_changed(ranks_MK[kept])
        ranks_MK[kept], _ = change.carried(change.kept, entrants_UC, self._depth)
        return cut_at(reach_M, ranks_MK)

    def _only_changed(self, ranks_UK: NDArray[np.int64]) -> NDArray[np.int64]:
        """Without the pairs of two unchanged rows that lie in a tile with changed ones: they are listed."""
        is_changed = np.zeros(len(self._names_M), bool)
        is_changed[self._change.moved] = True
        empty = ranks_UK == EMPTY
        return np.where(is_changed[np.where(empty, 0, ranks_UK & 0xFFFFFFFF)] & ~empty, ranks_UK, EMPTY)
