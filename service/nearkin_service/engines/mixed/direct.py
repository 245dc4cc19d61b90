"""Small tables: all products at once, and of each row those that can be among its k best, in order.

Up to `AT_ONCE` classes that is quicker than leaving some out, at 32 MiB for the products, unless their keys
are long and few of them are neighbours. Where k is large, products are float64 and are scores themselves.
Else they are float32, and what may matter is scored again.

Dimension letters: N classes, M present classes (M <= N), D elements of a key, k neighbours.
"""

from __future__ import annotations

import math
import time
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.canonical import doubtful_distance, unpack
from nearkin_service.engines.complete import Queries
from nearkin_service.engines.contract import BuildMonitor, BuiltTable
from nearkin_service.engines.keys import KeyedRows, fill_keys
from nearkin_service.engines.mixed.panels import product_error, settled
from nearkin_service.engines.mixed.ranking import best_of_products
from nearkin_service.engines.mixed.versions import versions
from nearkin_service.engines.pacing import Pace
from nearkin_service.engines.threads import one_thread_each
from nearkin_service.engines.workers import in_threads, worker_count

_FEW = 1 / 16  # of all classes: for fewer neighbours it pays to score them again
_SHARED = 1 << 17  # products: sharing the work of fewer among threads costs more than it saves


def build_direct(source: KeyedRows, k: int, monitor: BuildMonitor) -> BuiltTable:
    """The exact neighbour table of few classes, on the CPU."""
    began = time.monotonic()
    present = source.present()
    keys_MD = np.empty((len(present), source.key_size), np.float32)
    fill_keys(keys_MD, source, present, monitor)
    keyed = time.monotonic()
    ids = np.full((len(source.rows), k), -1, np.int32)
    scores = np.full(ids.shape, -np.inf, np.float32)
    redone = _self_join(keys_MD, (present, ids, scores), monitor)
    seconds = {"keys": keyed - began, "search": time.monotonic() - keyed}
    return BuiltTable(ids, scores, "mixed", "cpu", True, redone, seconds, versions())


def _self_join(
    keys_MD: NDArray[np.float32],
    table: tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]],
    monitor: BuildMonitor,
) -> int:
    """Fill in the table; returns how many rows hold a score too near half a step to be rounded."""
    present, ids, scores = table
    (count, size), k = keys_MD.shape, ids.shape[1]
    pace = Pace(monitor, "search", count)
    few = k < _FEW * count
    error = product_error(size) if few else 0.0
    factors_MD = keys_MD if few else keys_MD.astype(np.float64)
    products_MM = _products(factors_MD)
    rounded_safely = 0.5 - doubtful_distance(size)
    doubtful = np.zeros(count, np.bool_)
    step = count if count**2 < _SHARED else math.ceil(count / (4 * worker_count()))

    def choose(first: int) -> None:
        span = first, min(count, first + step)
        best_of_products(span, (products_MM, error, rounded_safely), keys_MD, table, doubtful)

    in_threads(choose, range(0, count, max(1, step)), lambda done: pace.done(done * step))
    redo = np.flatnonzero(doubtful)
    if len(redo):
        ranks = settled(Queries(keys_MD[redo], redo), keys_MD, k, monitor, np.arange(count))
        ids[present[redo]], scores[present[redo]] = unpack(ranks, present)
    pace.done(count)
    return len(redo)


def _products(factors_MD: NDArray[Any]) -> NDArray[Any]:
    """Of all pairs [M, M], each computed once: of a matrix with its own transpose NumPy computes half.

    Threads of the library's own would still wait busily for more while ours choose.
    """
    count = len(factors_MD)
    if count**2 < _SHARED:
        return np.asarray(factors_MD @ factors_MD.T)
    products_MM = np.empty((count, count), factors_MD.dtype)
    step = math.ceil(count / worker_count())
    blocks = [slice(start, start + step) for start in range(0, count, step)]

    def multiply(pair: tuple[slice, slice]) -> None:
        rows, columns = pair
        np.matmul(factors_MD[rows], factors_MD[columns].T, out=products_MM[rows, columns])
        if rows != columns:
            products_MM[columns, rows] = products_MM[rows, columns].T

    pairs = list(combinations_with_replacement(blocks, 2))
    with one_thread_each():
        in_threads(multiply, sorted(pairs, key=lambda pair: pair[0] == pair[1]))
    return products_MM
