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
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.canonical import EMPTY, STEPS, best, ranks, steps_of
from nearkin_service.engines.complete import Queries
from nearkin_service.engines.contract import BuildMonitor, BuiltTable
from nearkin_service.engines.devices import faiss_version
from nearkin_service.engines.flat import FlatIndex, filled_index, nearest, spread
from nearkin_service.engines.keys import KeyedRows
from nearkin_service.engines.pacing import BlockSize, Pace

log = logging.getLogger("nearkin.engines")

_COMPARED_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Parent:
    """The generation before: its rows as pushed [N, R], its exact table [N, k], and its absent classes."""

    rows: NDArray[Any]
    ids: NDArray[np.int32]
    scores: NDArray[np.float32]
    absent: NDArray[np.int64]


def changed_classes(source: KeyedRows, parent: Parent, monitor: BuildMonitor) -> NDArray[np.int64]:
    """Ids of the classes whose row's bytes, or whose absence, differ from the parent's; ascending."""
    count = len(source.rows)
    here, there = np.ones(count, bool), np.ones(count, bool)
    here[source.absent] = False
    there[parent.absent] = False
    changed = here != there
    step = max(1, _COMPARED_BYTES // max(1, source.rows[:1].nbytes))
    for start in range(0, count, step):
        monitor.check()
        some = slice(start, start + step)
        differ = (as_bytes(source.rows[some]) != as_bytes(parent.rows[some])).any(axis=1)
        changed[some] |= differ & here[some] & there[some]
    return np.flatnonzero(changed)


def as_bytes(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """Rows as they lie in memory, so that NaN equals itself and -0.0 differs from 0.0."""
    return np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)


def fits(source: KeyedRows, k: int, parent: Parent) -> bool:
    """Whether the parent's table can be carried over at all."""
    same_rows = parent.rows.shape == source.rows.shape and parent.rows.dtype == source.rows.dtype
    return same_rows and parent.ids.shape == (len(source.rows), k) and source.key != "qaconv"


def update_flat(
    source: KeyedRows, k: int, parent: Parent, changed: NDArray[np.int64], monitor: BuildMonitor
) -> BuiltTable:
    """The exact table of `source`, from its parent's and the ids of the changed classes. Runs on the CPU."""
    began = time.monotonic()
    present = source.present()
    index = filled_index(source, "cpu", monitor)
    keyed = time.monotonic()
    is_changed = np.zeros(len(source.rows), bool)
    is_changed[changed] = True
    ranks_Mk = np.full((len(present), k), EMPTY)
    certain = np.zeros(len(present), bool)
    kept = np.flatnonzero(~is_changed[present])
    moved = np.flatnonzero(is_changed[present])
    old = _old_ranks(parent, present, kept)
    stayed = np.where(is_changed[parent.ids[present[kept]]] | (parent.ids[present[kept]] < 0), EMPTY, old)
    merged = best(np.concatenate([stayed, _entrants(index, kept, moved, k, monitor)], axis=1), k)
    ranks_Mk[kept] = merged
    certain[kept] = merged[:, -1] <= old[:, -1]
    again = np.flatnonzero(~certain)
    _search(index, again, ranks_Mk, Pace(monitor, "search", len(again)))
    ids, scores = spread(ranks_Mk, present, len(source.rows))
    seconds = {"keys": keyed - began, "update": time.monotonic() - keyed}
    log.info("updated from the parent: %d changed, %d rows searched in full", len(changed), len(again))
    versions = {"faiss": faiss_version(), "numpy": np.__version__}
    return BuiltTable(ids, scores, "flat", "cpu", True, len(again), seconds, versions)


def _old_ranks(parent: Parent, present: NDArray[np.int64], kept: NDArray[np.int64]) -> NDArray[np.int64]:
    """The parent's ranks of the unchanged rows, with positions among the classes that are present now."""
    position = np.full(len(parent.ids), -1)
    position[present] = np.arange(len(present))
    ids = parent.ids[present[kept]]
    steps = np.rint(np.where(ids < 0, 0.0, parent.scores[present[kept]].astype(np.float64)) * STEPS)
    return ranks(steps.astype(np.int64), np.where(ids < 0, -1, np.maximum(position[ids], 0)))


def _entrants(
    index: FlatIndex,
    kept: NDArray[np.int64],
    moved: NDArray[np.int64],
    k: int,
    monitor: BuildMonitor,
) -> NDArray[np.int64]:
    """Ranks int64 [U, k'] of each unchanged row's best changed ones."""
    wanted = min(k, len(moved))
    entrants_Uk = np.full((len(kept), wanted), EMPTY)
    if not wanted:
        return entrants_Uk
    news = FlatIndex(len(moved), index.keys_MD.shape[1], "cpu")
    news.keys_MD[:] = index.keys_MD[moved]
    pace = Pace(monitor, "compare", len(kept))
    block = BlockSize(1024, 1 << 14)
    done = 0
    while done < len(kept):
        block.start()
        some = kept[done : done + block.rows]
        queries = Queries(index.keys_MD[some], np.full(len(some), -1))
        found, _ = nearest(news, queries, wanted, monitor)
        empty = found == EMPTY
        entrants = ranks(steps_of(found), moved[np.where(empty, 0, found & 0xFFFFFFFF)])
        entrants_Uk[done : done + len(some)] = np.where(empty, EMPTY, entrants)
        done += len(some)
        pace.done(done)
        block.finish()
    return entrants_Uk


def _search(index: FlatIndex, rows: NDArray[np.int64], ranks_Mk: NDArray[np.int64], pace: Pace) -> None:
    """Search some rows in full, in place."""
    block = BlockSize(256, 1 << 14)
    done = 0
    while done < len(rows):
        block.start()
        own = rows[done : done + block.rows]
        ranks_Mk[own], _ = nearest(index, Queries(index.keys_MD[own], own), ranks_Mk.shape[1], pace.monitor)
        done += len(own)
        pace.done(done)
        block.finish()
