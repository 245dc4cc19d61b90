"""Some rows against all: products of a few queries at a time with every key, and the k best of each.

For short keys, and where few rows need a search: twice the products that a scan computes per pair.

Dimension letters: Q queries, M keys, D elements of a key, k neighbours.
"""

from __future__ import annotations

import math
import threading

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.canonical import EMPTY, doubtful_distance
from nearkin_service.engines.complete import Queries, exact_ranks
from nearkin_service.engines.contract import BuildMonitor
from nearkin_service.engines.mixed.ranking import STEP, best_of_panel
from nearkin_service.engines.threads import one_thread_each
from nearkin_service.engines.workers import in_threads, worker_count

_ONE_BY_ONE = 32  # so few rows are better settled one after the other than against all keys
_PANEL_ROWS, _PANEL_ELEMENTS = 512, 1 << 24
_LEAST_ROWS, _PER_ELEMENT = 32, 1 << 14  # of short keys a panel has few products, and should stay in cache
_PANEL_PRODUCTS = 1 << 34  # at most a fraction of a second's work
_SUMMED = 512  # elements that the library sums in its own order; these sums are added up here


def product_error(size: int) -> float:
    """By how much a float32 sum of so many products of two keys' elements can be off, in whatever order."""
    return 1.01 * (size + 8) * 2.0**-24


def search_in_panels(
    keys_MD: NDArray[np.float32],
    queries: Queries,
    k: int,
    monitor: BuildMonitor,
    names_M: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], int]:
    """Exact ranks int64 [Q, k] of each query, and how many rows needed the second pass.

    Ranks hold the keys' positions, or their names where those are given: then ties go to the lower name.
    """
    count, size = keys_MD.shape
    ranks_Qk = np.full((len(queries.own), k), EMPTY)
    if not count:
        return ranks_Qk, 0
    doubtful = np.zeros(len(queries.own), np.bool_)
    local = threading.local()
    shared = math.ceil(len(queries.own) / worker_count())
    cached = max(_LEAST_ROWS, _PER_ELEMENT * size // count)
    rows = max(1, min(_PANEL_ROWS, _PANEL_ELEMENTS // count, _PANEL_PRODUCTS // keys_MD.size, shared, cached))
    names_M = np.arange(count) if names_M is None else names_M
    task = keys_MD, names_M, product_error(summed_at_most(size)), 0.5 - doubtful_distance(size)

    def search(first: int) -> None:
        if not hasattr(local, "panel"):
            local.panel, local.part = np.empty((2, rows, count), np.float32)
        some = slice(first, first + rows)
        queries_QD = np.ascontiguousarray(queries.keys[some])
        products_QM, part_QM = local.panel[: len(queries_QD)], local.part[: len(queries_QD)]
        multiply(queries_QD, keys_MD, products_QM, part_QM)
        asked = queries_QD, queries.own[some]
        best_of_panel(products_QM, asked, task, ranks_Qk[some], doubtful[some])

    with one_thread_each():
        in_threads(search, range(0, len(queries.own), rows), lambda done: monitor.check())
    redo = np.flatnonzero(doubtful)
    remaining = Queries(queries.keys[redo], queries.own[redo])
    ranks_Qk[redo] = settled(remaining, keys_MD, k, monitor, names_M)
    return ranks_Qk, len(redo)


def summed_at_most(size: int) -> int:
    """Roundings that a product of float32 keys sees: those of one part, and one per part."""
    parts = math.ceil(size / _SUMMED)
    return size if parts < 2 else _SUMMED + parts


def multiply(
    queries_QD: NDArray[np.float32],
    keys_MD: NDArray[np.float32],
    products_QM: NDArray[np.float32],
    part_QM: NDArray[np.float32],
) -> None:
    """All pairs' products, part by part of the elements, into `products_QM`.

    Each sees at most `summed_at_most` roundings; `part_QM` is room for another product like this one.
    """
    np.matmul(queries_QD[:, :_SUMMED], keys_MD[:, :_SUMMED].T, out=products_QM)
    for start in range(_SUMMED, keys_MD.shape[1], _SUMMED):
        some = slice(start, start + _SUMMED)
        products_QM += np.matmul(queries_QD[:, some], keys_MD[:, some].T, out=part_QM)


def settled(
    queries: Queries, keys_MD: NDArray[np.float32], k: int, monitor: BuildMonitor, names_M: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Ranks int64 [Q, k] of queries whose scores are to be rounded without error."""
    if len(queries.own) > _ONE_BY_ONE:
        return exact_ranks(queries, keys_MD, k, monitor, names_M)
    ranks_Qk = np.full((len(queries.own), k), EMPTY)
    for query in range(len(ranks_Qk)):
        near = _near(queries.keys[query], int(queries.own[query]), keys_MD, k)
        one = Queries(queries.keys[query : query + 1], np.array([-1]))
        ranks_Qk[query] = exact_ranks(one, keys_MD[near], k, monitor, names_M[near])[0]
    return ranks_Qk


def _near(query_D: NDArray[np.float32], own: int, keys_MD: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Places of the keys that can be among the k best of one query."""
    near = keys_MD @ query_D
    if own >= 0:
        near[own] = -4
    kth = np.partition(near, -min(k, len(near)))[-min(k, len(near))]
    reach = 2 * product_error(keys_MD.shape[1]) + STEP
    return np.flatnonzero(near >= max(-3.0, min(float(kth), 1.0) - reach))
