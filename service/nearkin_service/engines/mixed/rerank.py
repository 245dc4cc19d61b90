"""From sieves to exact ranks: the k most promising pairs of a row, then whatever may still beat them.

A pair that both of its rows want is scored once. The rivals of wide rows are scored in float32 first, part by
part of the keys in cache; only those that float32 cannot tell from the k best are then scored exactly.

Dimension letters: M keys, P keys padded to whole blocks, W places in a sieve's row, G rows of a group,
D elements of a key, k neighbours.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.canonical import EMPTY, STEPS, best, settle_doubt, steps_of
from nearkin_service.engines.contract import BuildMonitor
from nearkin_service.engines.mixed.kernels import (
    CLOSED,
    ROUNDING,
    UNKNOWN,
    Sieve,
    add_part_products,
    deliver,
    known_ranks,
    least_known,
    list_pairs,
    pack_rows,
    pair_products,
    unpack_rows,
)
from nearkin_service.engines.pacing import Pace
from nearkin_service.engines.workers import in_threads, worker_count

_WIDE = 2048
_PART_KEYS, _PART_ELEMENTS = 512, 512  # a MiB in float32: fits a core's own cache
_ERROR_32 = math.ceil(1.02 * (_PART_ELEMENTS + 2)) + 2
"""Steps by which a float32 score can be off: a part, summed in any order, by 2**-24 per element of its share
of |a||b|, while parts are added in float64; and two, since this score and the k-th are rounded to steps."""
_GROUP_PAIRS = 1 << 19
_WIDE_GROUP_ROWS = 1 << 14

Pairs = tuple[NDArray[np.int64], NDArray[np.int32]]
Wanted = tuple[NDArray[Any], NDArray[Any]]


class Reranking:
    """Exact scores of the sieves' pairs, as far as they are needed."""

    def __init__(self, keys_MD: NDArray[np.float32], sieve: Sieve, k: int, monitor: BuildMonitor) -> None:
        self._keys_MD, self._sieve, self._k, self._monitor = keys_MD, sieve, k, monitor
        self._best_Mk = np.full((len(keys_MD), k), EMPTY)
        self._exact_MW = np.empty((0, 0), np.int32)

    def run(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Ranks int64 [M, k], and which rows are proved to be the exact k best."""
        likely = np.zeros(len(self._sieve.limits), np.int16)
        self._each_group(lambda first, last: self._put_in_order(first, last, likely))
        self._exact_MW = np.full((len(self._keys_MD), int(self._sieve.counts.max(initial=0))), UNKNOWN)
        self._score((self._sieve.values, likely), "rerank the best")
        kth = np.empty(len(self._keys_MD), np.int32)
        self._each_group(
            lambda first, last: least_known((first, last), self._k, self._sieve, self._exact_MW, kth)
        )
        rivals = self._sieve.values, self._least_rivals(kth)
        if self._keys_MD.shape[1] >= _WIDE:
            rivals = self._screened(rivals, kth)
        self._score(rivals, "rerank rivals")
        self._each_group(self._gather)
        return self._best_Mk, self._certified()

    def _put_in_order(self, first: int, last: int, likely: NDArray[np.int16]) -> None:
        """A range of sieves by ascending id; `likely` becomes the k-th value of each."""
        packed_GW = np.full((last - first, int(self._sieve.counts[first:last].max(initial=0))), EMPTY)
        most = pack_rows((first, last), self._k, self._sieve, likely, packed_GW)
        unpack_rows((first, last), np.sort(packed_GW[:, :most], axis=1), self._sieve)

    def _score(self, wanted: Wanted, stage: str) -> None:
        """Exact scores of the pairs that are wanted."""

        def score_rows(first: int, last: int) -> None:
            queries_GD = self._keys_MD[first:last]
            starts, others = list_pairs((first, last), wanted, self._sieve, self._exact_MW)
            products = np.empty(len(others))
            pair_products(self._keys_MD, queries_GD, (starts, others), products)
            owners = np.repeat(np.arange(last - first), np.diff(starts))
            terms = int(self._keys_MD.shape[1])
            steps = settle_doubt(products, terms, (queries_GD, owners), (self._keys_MD, others))
            deliver(first, (starts, others), steps, self._sieve, self._exact_MW)

        self._each_group(score_rows, Pace(self._monitor, stage, len(self._keys_MD)))

    def _screened(self, rivals: Wanted, kth: NDArray[np.int32]) -> Wanted:
        """The rivals by their scores in float32, and per row the least of those that may beat the k best."""
        scores_MW, count = np.full_like(self._exact_MW, UNKNOWN), len(self._keys_MD)
        pace = Pace(self._monitor, "screen rivals", count)
        for first in range(0, count, _WIDE_GROUP_ROWS):
            last = min(count, first + _WIDE_GROUP_ROWS)
            pairs = list_pairs((first, last), rivals, self._sieve, self._exact_MW)
            products = self._products_in_parts(self._keys_MD[first:last], pairs)
            deliver(first, pairs, np.rint(products * STEPS).astype(np.int64), self._sieve, scores_MW)
            pace.done(last)
        least = np.maximum(kth.astype(np.int64) - _ERROR_32, UNKNOWN + 1)
        return scores_MW, least.astype(np.int32)

    def _products_in_parts(self, queries_GD: NDArray[np.float32], pairs: Pairs) -> NDArray[np.float64]:
        """Inner products, part by part in float32; each thread takes some of the parts, for all pairs."""
        size = self._keys_MD.shape[1]
        sums, adding = np.zeros(len(pairs[1])), threading.Lock()

        def add(left: int) -> None:
            packed = np.empty((_PART_KEYS, min(_PART_ELEMENTS, size - left)), np.float32)
            products = np.zeros(len(sums))
            add_part_products((self._keys_MD, queries_GD), left, pairs, packed, products)
            with adding:
                np.add(sums, products, out=sums)

        in_threads(add, range(0, size, _PART_ELEMENTS), lambda begun: self._monitor.check())
        return sums

    def _gather(self, first: int, last: int) -> None:
        """The k best of the pairs that were scored, in order."""
        ranks_GW = np.full((last - first, max(self._k, self._exact_MW.shape[1])), EMPTY)
        known_ranks((first, last), self._sieve, self._exact_MW, ranks_GW)
        self._best_Mk[first:last] = best(ranks_GW, self._k)

    def _each_group(self, work: Callable[[int, int], None], pace: Pace | None = None) -> None:
        count = len(self._keys_MD)
        step = max(16, min(_GROUP_PAIRS // (2 * self._k), math.ceil(count / (2 * worker_count()))))
        in_threads(
            lambda first: work(first, min(count, first + step)),
            range(0, count, step),
            (lambda begun: pace.done(begun * step)) if pace else (lambda begun: self._monitor.check()),
        )

    def _least_rivals(self, kth: NDArray[np.int32]) -> NDArray[np.int16]:
        """Per row the least value that can stand for a score as good as one of so many steps."""
        least = ((kth.astype(np.int64) - 1) / STEPS - self._sieve.errors[: len(kth)]) / (1 + ROUNDING)
        return (np.maximum(least, 0).astype(np.float32).view(np.int32) >> 16).astype(np.int16)

    def _certified(self) -> NDArray[np.bool_]:
        """What a sieve dropped was no greater than its limit: can any of that reach the k-th place?"""
        limits = self._sieve.limits[: len(self._keys_MD)]
        reach = as_scores(limits) * (1 + ROUNDING) + self._sieve.errors[: len(self._keys_MD)]
        kth = (steps_of(self._best_Mk[:, -1]) - 1) / STEPS  # less the step that rounding may have added
        sure: NDArray[np.bool_] = (limits != CLOSED) & (kth > reach)
        return sure


def as_scores(values: NDArray[np.int16]) -> NDArray[np.float64]:
    """Scores of bfloat16 bits."""
    return (values.astype(np.int32) << 16).view(np.float32).astype(np.float64)
