"""From sieves to exact ranks: the k most promising pairs of a row, then whatever may still beat them.

A pair that both of its rows want is scored once. Wide rows are scored part by part, so that the parts of all
keys stay in cache. Where tiles were bfloat16, rivals of wide rows are scored in float32 first, and exactly
only if that cannot tell them from the k best.

Dimension letters: M keys, U of them, P keys padded to whole blocks, G rows of a group, W places of the
longest of their sieves, D elements of a key, E of a part, k neighbours.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.canonical import EMPTY, STEPS, best, in_steps, settle_doubt, steps_of
from nearkin_service.engines.contract import BuildMonitor
from nearkin_service.engines.mixed.held import WIDE, Keys
from nearkin_service.engines.mixed.kernels import (
    UNKNOWN,
    Sieve,
    deliver,
    known_ranks,
    known_scores,
    list_pairs,
    pack_rows,
    unpack_rows,
)
from nearkin_service.engines.mixed.products import add_pair_products, aligned
from nearkin_service.engines.mixed.simd import WIDTH
from nearkin_service.engines.mixed.values import VACANT, as_scores, least_values, reach_of
from nearkin_service.engines.pacing import Pace
from nearkin_service.engines.workers import in_threads, worker_count

_PART_BYTES = 1 << 23  # of all keys: what a core's share of the cache holds
_FEW_PAIRS = 4
_PART_ELEMENTS, _LEAST_PART = 512, 64
_ERROR_32 = math.ceil(1.02 * (_PART_ELEMENTS + 2)) + 2
"""Steps by which a float32 score can be off: a part, summed in any order, by 2**-24 per element of its share
of |a||b|, while parts are added in float64; and two, since this score and the k-th are rounded to steps."""
_GROUP_PAIRS = 1 << 19
_WIDE_GROUP_ROWS = 1 << 14

Pairs = tuple[NDArray[np.int64], NDArray[np.int32]]
Wanted = tuple[NDArray[Any], NDArray[Any]]
Whole = TypeVar("Whole", np.int16, np.int32)


class Reranking:
    """Exact scores of the sieves' pairs, as far as they are needed."""

    def __init__(
        self,
        keys: Keys,
        sieve: Sieve,
        k: int,
        monitor: BuildMonitor,
        names_M: NDArray[np.int64] | None = None,
    ) -> None:
        self._keys, self._sieve, self._k, self._monitor = keys, sieve, k, monitor
        self._count, self._size = keys.shape
        self._names_M = np.arange(self._count) if names_M is None else names_M
        self._best_Mk = np.full((self._count, k), EMPTY)
        self._exact = np.empty(0, np.int32)  # of each place of the sieves, in steps
        self._errors = sieve.errors[: self._count]
        self._wide = self._size >= WIDE
        self._roundings = self._size  # that a term of a float64 sum may see
        if self._wide:  # in its part, then as its part is added to others, and its thread's to others'
            self._roundings = _PART_ELEMENTS + math.ceil(self._size / _LEAST_PART) + worker_count()

    def run(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Ranks int64 [M, k], which hold positions or names, and per row what `cut_at` cuts at."""
        likely = np.full(len(self._sieve.limits), VACANT)
        self._each_group(lambda first, last: self._put_in_order(first, last, likely))
        self._exact = np.full(min(int(self._sieve.taken[0]), len(self._sieve.values)), UNKNOWN)
        if self._wide and not self._sieve.rounding:  # each pass reads all keys: one is enough
            at_least = np.floor((as_scores(likely[: self._count], 0.0) - self._errors) * STEPS)
            self._score(self._rivals(at_least.astype(np.int32)), "rerank")
        else:
            self._score((self._sieve.values, likely), "rerank the best")
            self._score_rivals()
        self._each_group(self._gather)
        return self._best_Mk, self._reach()

    def _score_rivals(self) -> None:
        """Exact scores of whatever may still beat the k best that were scored."""
        kth = np.empty(self._count, np.int32)

        def find(first: int, last: int) -> None:
            scores_GW = np.full((last - first, self._longest(first, last)), UNKNOWN)
            most = known_scores((first, last), self._sieve, self._exact, scores_GW)
            kth[first:last] = _kth_largest(scores_GW[:, :most], self._k, UNKNOWN)

        self._each_group(find)
        rivals = self._rivals(kth)
        self._score(self._screened(rivals, kth) if self._wide else rivals, "rerank rivals")

    def _put_in_order(self, first: int, last: int, likely: NDArray[np.int16]) -> None:
        """A range of sieves by ascending id; `likely` becomes the k-th value of each."""
        packed_GW = np.full((last - first, self._longest(first, last)), EMPTY)
        most = pack_rows((first, last), self._k, self._sieve, packed_GW)
        packed_GW = packed_GW[:, :most]
        values_GW = np.where(packed_GW == EMPTY, VACANT, packed_GW.astype(np.int16))
        kth = _kth_largest(values_GW, self._k, VACANT)
        likely[first:last] = np.maximum(kth, self._sieve.floor)
        unpack_rows((first, last), np.sort(packed_GW, axis=1), self._sieve)

    def _score(self, wanted: Wanted, stage: str) -> None:
        """Exact scores of the pairs that are wanted."""
        if self._wide:
            self._score_in_parts(wanted, self._exact, np.dtype(np.float64), stage)
            return

        def score_rows(first: int, last: int) -> None:
            pairs = list_pairs((first, last), wanted, self._sieve, self._exact)
            steps = self._exact_steps(first, pairs, self._products(first, pairs))
            deliver(first, pairs, steps, self._sieve, self._exact)

        self._each_group(score_rows, Pace(self._monitor, stage, self._count))

    def _products(self, first: int, pairs: Pairs) -> NDArray[np.float64]:
        """Inner products, one whole key after the other."""
        products = np.zeros(len(pairs[1]))
        owners = np.arange(first, first + len(pairs[0]) - 1)
        add_pair_products(self._keys.whole(), owners, pairs, aligned((self._size,), np.float64), products)
        return products

    def _exact_steps(self, first: int, pairs: Pairs, products: NDArray[np.float64]) -> NDArray[np.int64]:
        """The canonical steps of pairs of the rows from `first` on, from their products in float64."""
        owners = np.repeat(np.arange(first, first + len(pairs[0]) - 1), np.diff(pairs[0]))
        return settle_doubt(products, self._roundings, (self._keys, owners), (self._keys, pairs[1]))

    def _screened(self, rivals: Wanted, kth: NDArray[np.int32]) -> Wanted:
        """The rivals by their scores in float32, and per row the least of those that may beat the k best."""
        scores = np.full_like(self._exact, UNKNOWN)
        self._score_in_parts(rivals, scores, np.dtype(np.float32), "screen rivals")
        least = np.maximum(kth.astype(np.int64) - _ERROR_32, UNKNOWN + 1)
        return scores, least.astype(np.int32)

    def _score_in_parts(
        self, wanted: Wanted, scores: NDArray[np.int32], dtype: np.dtype[Any], stage: str
    ) -> None:
        """Scores in steps of pairs that are wanted and not exact yet; of float64 products, exact ones."""
        count = self._count
        pace = Pace(self._monitor, stage, count)
        for first in range(0, count, _WIDE_GROUP_ROWS):
            last = min(count, first + _WIDE_GROUP_ROWS)
            pairs = list_pairs((first, last), wanted, self._sieve, self._exact)
            products = self._products_in_parts(first, pairs, dtype)
            exact = dtype == np.float64
            steps = self._exact_steps(first, pairs, products) if exact else in_steps(products)
            deliver(first, pairs, steps, self._sieve, scores)
            pace.done(last)

    def _products_in_parts(self, first: int, pairs: Pairs, dtype: np.dtype[Any]) -> NDArray[np.float64]:
        """Inner products, part by part in a type; each thread takes some of the parts, for all pairs."""
        if not len(pairs[1]):
            return np.zeros(0)
        rows = np.flatnonzero(np.diff(pairs[0]))
        owners, pairs = first + rows, (np.append(pairs[0][rows], len(pairs[1])), pairs[1])
        count: int = self._count
        used: NDArray[np.int64] | slice = slice(None)
        if _FEW_PAIRS * len(pairs[1]) < count:  # not worth reading all keys for
            used = np.union1d(owners, pairs[1])
            owners, others = np.searchsorted(used, owners), np.searchsorted(used, pairs[1])
            count, pairs = len(used), (pairs[0], others.astype(np.int32))
        width = min(_PART_ELEMENTS, max(_LEAST_PART, _PART_BYTES // (4 * count) // WIDTH * WIDTH))
        local, sums = threading.local(), list[NDArray[np.float64]]()

        def add(left: int) -> None:
            if not hasattr(local, "sums"):  # kept from part to part: new memory has to be cleared each time
                local.packed = aligned((count * width,), np.float32)
                local.sums = np.zeros(len(pairs[1]))
                sums.append(local.sums)
            part = min(width, self._size - left)
            part_UE = local.packed[: count * part].reshape(count, part)
            self._keys.copy_part(used, slice(left, left + part), part_UE)
            add_pair_products(part_UE, owners, pairs, aligned((part,), dtype), local.sums)

        in_threads(add, range(0, self._size, width), lambda done: self._monitor.check())
        return np.asarray(np.sum(sums, axis=0))

    def _gather(self, first: int, last: int) -> None:
        """The k best of the pairs that were scored, in order."""
        ranks_GW = np.full((last - first, self._longest(first, last)), EMPTY)
        most = known_ranks((first, last), self._sieve, self._exact, self._names_M, ranks_GW)
        self._best_Mk[first:last] = best(ranks_GW[:, :most], self._k)

    def _each_group(self, work: Callable[[int, int], None], pace: Pace | None = None) -> None:
        count = self._count
        step = max(16, min(_GROUP_PAIRS // (2 * self._k), math.ceil(count / (2 * worker_count()))))
        in_threads(
            lambda first: work(first, min(count, first + step)),
            range(0, count, step),
            (lambda done: pace.done(done * step)) if pace else (lambda done: self._monitor.check()),
        )

    def _longest(self, first: int, last: int) -> int:
        return int(self._sieve.counts[first:last].max(initial=0))

    def _rivals(self, kth: NDArray[np.int32]) -> Wanted:
        """The pairs whose values can stand for a score as good as one of so many steps, given per row."""
        least = (kth.astype(np.int64) - 1) / STEPS
        return self._sieve.values, least_values(least, self._errors, self._sieve.rounding)

    def _reach(self) -> NDArray[np.float64]:
        """The greatest score of what a sieve may have dropped."""
        return reach_of(self._sieve.limits[: self._count], self._errors, self._sieve.rounding)


def _kth_largest(values_GW: NDArray[Whole], k: int, none: Whole) -> NDArray[Whole]:
    """Of each row; `none` if there are fewer."""
    rows, width = values_GW.shape
    if width < k:
        return np.full(rows, none)
    return np.partition(values_GW, width - k, axis=1)[:, width - k]


def cut_at(reach_M: NDArray[np.float64], ranks_Mk: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ranks int64 [M, k] without those that something of a score within reach could precede."""
    scores_Mk = (steps_of(ranks_Mk) - 1) / STEPS  # less the step that rounding may have added
    return np.where(scores_Mk > reach_M[:, None], ranks_Mk, EMPTY)
