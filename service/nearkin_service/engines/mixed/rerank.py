"""From sieves to exact ranks: the k most promising pairs of a row, then whatever may still beat them.

A pair that both of its rows want is scored once.

Dimension letters: M keys, P keys padded to whole blocks, W places in a sieve's row, D elements of a key,
k neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.canonical import EMPTY, STEPS, settle_doubt, steps_of
from nearkin_service.engines.contract import BuildMonitor
from nearkin_service.engines.mixed.kernels import (
    CLOSED,
    ROUNDING,
    UNKNOWN,
    Sieve,
    best_known,
    deliver,
    finish_rows,
    list_pairs,
    pair_products,
    wide_pair_products,
)
from nearkin_service.engines.pacing import Pace
from nearkin_service.engines.workers import in_threads, worker_count

_WIDE = 2048
_PACKED = 128, 512  # elements and keys at a time: half a MiB in float64, in a core's own cache
_PAIRS_PER_BLOCK = 4  # below, packing costs more than it saves
_GROUP_PAIRS = 1 << 19


class Reranking:
    """Exact scores of the sieves' pairs, as far as they are needed."""

    def __init__(self, keys_MD: NDArray[np.float32], sieve: Sieve, k: int, monitor: BuildMonitor) -> None:
        self._keys_MD, self._sieve, self._k, self._monitor = keys_MD, sieve, k, monitor
        self._best_Mk = np.full((len(keys_MD), k), EMPTY)
        self._exact_MW = np.empty((0, 0), np.int32)

    def run(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Ranks int64 [M, k], and which rows are proved to be the exact k best."""
        least = np.zeros(len(self._sieve.limits), np.int16)
        self._each_group(lambda first, last: finish_rows((first, last), self._k, self._sieve, least))
        self._exact_MW = np.full((len(self._keys_MD), int(self._sieve.counts.max(initial=0))), UNKNOWN)
        self._score(least, "rerank the best")
        least[: len(self._keys_MD)] = self._least_rivals()
        self._score(least, "rerank rivals")
        return self._best_Mk, self._certified()

    def _score(self, least: NDArray[np.int16], stage: str) -> None:
        pace = Pace(self._monitor, stage, len(self._keys_MD))
        self._each_group(lambda first, last: self._score_rows(first, last, least), pace)
        self._each_group(self._gather)

    def _score_rows(self, first: int, last: int, least: NDArray[np.int16]) -> None:
        starts, others = list_pairs((first, last), least, self._sieve, self._exact_MW)
        queries_GD = self._keys_MD[first:last]
        products = np.empty(len(others))
        terms = self._multiply(queries_GD, (starts, others), products)
        owners = np.repeat(np.arange(last - first), np.diff(starts))
        steps = settle_doubt(products, terms, (queries_GD, owners), (self._keys_MD, others))
        deliver(first, (starts, others), steps, self._sieve, self._exact_MW)

    def _multiply(
        self,
        queries_GD: NDArray[np.float32],
        pairs: tuple[NDArray[np.int64], NDArray[np.int32]],
        products: NDArray[np.float64],
    ) -> int:
        """Fill in the pairs' products; returns how many roundings each can have seen."""
        count, size = map(int, self._keys_MD.shape)
        if size >= _WIDE and len(pairs[1]) * _PACKED[1] >= _PAIRS_PER_BLOCK * count * len(queries_GD):
            wide_pair_products(self._keys_MD, queries_GD, pairs, _PACKED, products)
            return _PACKED[0] + size // _PACKED[0] + 1
        pair_products(self._keys_MD, queries_GD, pairs, products)
        return size

    def _gather(self, first: int, last: int) -> None:
        best_known((first, last), self._sieve, self._exact_MW, self._best_Mk[first:last])

    def _each_group(self, work: Callable[[int, int], None], pace: Pace | None = None) -> None:
        count = len(self._keys_MD)
        step = max(16, min(_GROUP_PAIRS // (2 * self._k), math.ceil(count / (2 * worker_count()))))
        in_threads(
            lambda first: work(first, min(count, first + step)),
            range(0, count, step),
            (lambda begun: pace.done(begun * step)) if pace else (lambda begun: self._monitor.check()),
        )

    def _least_rivals(self) -> NDArray[np.int16]:
        """Per row the least value that can stand for a score as good as its k-th best so far."""
        errors = self._sieve.errors[: len(self._keys_MD)]
        least = (self._kth() - errors) / (1 + ROUNDING)
        return (np.maximum(least, 0).astype(np.float32).view(np.int32) >> 16).astype(np.int16)

    def _certified(self) -> NDArray[np.bool_]:
        """What a sieve dropped was no greater than its limit: can any of that reach the k-th place?"""
        limits = self._sieve.limits[: len(self._keys_MD)]
        reach = as_scores(limits) * (1 + ROUNDING) + self._sieve.errors[: len(self._keys_MD)]
        sure: NDArray[np.bool_] = (limits != CLOSED) & (self._kth() > reach)
        return sure

    def _kth(self) -> NDArray[np.float64]:
        """The k-th best score so far, less the step that canonical rounding may have added."""
        kth: NDArray[np.float64] = (steps_of(self._best_Mk[:, -1]) - 1) / STEPS
        return kth


def as_scores(values: NDArray[np.int16]) -> NDArray[np.float64]:
    """Scores of bfloat16 bits."""
    return (values.astype(np.int32) << 16).view(np.float32).astype(np.float64)
