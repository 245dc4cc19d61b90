"""From a matrix product's candidates to the exact k nearest, ties included.

A product in float32 returns the best candidates by *almost* the true score, and any subset of those that tie.
Here candidates are scored canonically; a row is settled when the worst score that was returned, plus the
product's error, cannot reach the row's k-th place. What is not settled is computed again against every key,
in float64.

Dimension letters: Q queries, C candidates of a query, M keys, D elements of a key, k neighbours, B keys of a
block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.canonical import (
    EMPTY,
    STEPS,
    best,
    pair_steps,
    ranks,
    settle_doubt,
    steps_of,
)
from nearkin_service.engines.contract import BuildMonitor

LEAST_BAND = 1e-6
_BAND_OVER_SEEN = 8.0  # the error of scores that were not seen, over the largest one seen
_EXACT_BYTES = 96 << 20


@dataclass(frozen=True, slots=True)
class Queries:
    """Keys [Q, D] to find neighbours of, and the position of each one's own key among the keys (-1: none)."""

    keys: NDArray[np.float32]
    own: NDArray[np.int64]


def complete(
    queries: Queries,
    keys_MD: NDArray[np.float32],
    found_QC: tuple[NDArray[np.float32], NDArray[np.int64]],
    k: int,
    monitor: BuildMonitor,
    *,
    spare: int = 0,
) -> tuple[NDArray[np.int64], int]:
    """The exact ranks int64 [Q, k + spare] from a float32 search, and how many rows had to be redone.

    `found_QC` is the search's scores, descending, and their positions among the keys. No row is redone for
    the sake of its spare places: what the search does not settle there is `EMPTY`.
    """
    approximate_QC, positions_QC = found_QC
    steps_QC = pair_steps(queries.keys, keys_MD, positions_QC)
    packed_QC = ranks(steps_QC, np.where(positions_QC == queries.own[:, None], -1, positions_QC))
    best_Qk = best(packed_QC, k + spare)
    if positions_QC.shape[1] >= len(keys_MD):
        return best_Qk, 0
    seen_error = np.abs(steps_QC / STEPS - approximate_QC).max(initial=0.0, where=positions_QC >= 0)
    band = max(LEAST_BAND, _BAND_OVER_SEEN * float(seen_error))
    reach_Q = approximate_QC[:, -1] + band
    settled_Qk = steps_of(best_Qk) / STEPS > reach_Q[:, None]
    best_Qk[~settled_Qk] = EMPTY
    open_rows = np.flatnonzero(~settled_Qk[:, k - 1])
    if len(open_rows):
        remaining = Queries(queries.keys[open_rows], queries.own[open_rows])
        best_Qk[open_rows] = exact_ranks(remaining, keys_MD, k + spare, monitor)
    return best_Qk, len(open_rows)


def exact_ranks(
    queries: Queries,
    keys_MD: NDArray[np.float32],
    k: int,
    monitor: BuildMonitor,
    names_M: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """The k best ranks of each query against every key, in float64 and bounded memory.

    Ranks hold the keys' positions, or their names where those are given.
    """
    names_M = np.arange(len(keys_MD)) if names_M is None else names_M
    size = max(keys_MD.shape[1], 1)
    block = int(min(4096, max(16, _EXACT_BYTES // (8 * size))))
    rows = int(min(512, max(16, _EXACT_BYTES // (8 * size))))
    result_Qk = np.full((len(queries.own), k), EMPTY)
    for top in range(0, len(result_Qk), rows):
        part = Queries(queries.keys[top : top + rows], queries.own[top : top + rows])
        for left in range(0, len(keys_MD), block):
            monitor.check()
            packed_QB = _block_ranks(part, keys_MD[left : left + block], left, names_M)
            merged = np.concatenate([result_Qk[top : top + rows], packed_QB], axis=1)
            result_Qk[top : top + rows] = np.partition(merged, k - 1, axis=1)[:, :k]
    result_Qk.sort(axis=1)
    return result_Qk


def _block_ranks(
    queries: Queries, keys_BD: NDArray[np.float32], left: int, names_M: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Ranks of all pairs of a block. A float64 product may round the other way only next to a half step."""
    scores_QB = queries.keys.astype(np.float64) @ keys_BD.astype(np.float64).T
    owners_P, others_P = np.divmod(np.arange(scores_QB.size), scores_QB.shape[1])
    steps_P = settle_doubt(scores_QB.ravel(), keys_BD.shape[1], (queries.keys, owners_P), (keys_BD, others_P))
    steps_QB = steps_P.reshape(scores_QB.shape)
    packed_QB = ranks(steps_QB, names_M[None, left : left + len(keys_BD)])
    inside = np.flatnonzero((queries.own >= left) & (queries.own < left + len(keys_BD)))
    packed_QB[inside, queries.own[inside] - left] = EMPTY
    return packed_QB
