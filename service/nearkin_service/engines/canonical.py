"""The one score of a pair of keys, the same wherever and however often it is computed.

A matrix product's last bits depend on where in the matrix a pair lies. So engines use products to *find*
candidates, and every score that leaves an engine is computed here: float64 sums of exact float32 products in
a fixed order, rounded to a whole number of 2**-24 (each such number in [-1, 1] is a float32). A score
and the id it belongs to then fit one int64, a rank: ascending means highest score first, ties by lower id.

Dimension letters: Q queries, C candidates of a query, M keys, D elements of a key, k neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.contract import NO_NEIGHBOUR

STEPS = 1 << 24
"""Score steps between 0 and 1."""
LANES = 64
EMPTY = np.int64(np.iinfo(np.int64).max)
"""A rank that stands for nobody; sorts last."""


def lane_sum(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over the last axis in the fixed order: 64 running lanes, folded in halves."""
    size = products.shape[-1]
    whole = size - size % LANES
    if whole:
        lanes = products[..., :whole].reshape(*products.shape[:-1], whole // LANES, LANES).sum(axis=-2)
    else:
        lanes = np.zeros((*products.shape[:-1], LANES))
    lanes[..., : size - whole] += products[..., whole:]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    total: NDArray[np.float64] = lanes[..., 0]
    return total


def in_steps(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Scores as whole numbers of 2**-24, within [-1, 1]."""
    return np.rint(np.clip(scores, -1.0, 1.0) * STEPS).astype(np.int64)


def pair_steps(
    queries_QD: NDArray[np.float32], keys_MD: NDArray[np.float32], positions_QC: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The canonical score, in steps, of each query with the keys at its positions (-1: none, any value)."""
    steps = np.empty(positions_QC.shape, np.int64)
    for row, (query_D, positions_C) in enumerate(zip(queries_QD, positions_QC, strict=True)):
        products = np.multiply(keys_MD[np.maximum(positions_C, 0)], query_D, dtype=np.float64)
        steps[row] = in_steps(lane_sum(products))
    return steps


def ranks(steps: NDArray[np.int64], positions: NDArray[Any]) -> NDArray[np.int64]:
    """One int64 per pair, ascending from best to worst; `EMPTY` where the position is negative."""
    packed = (-steps << 32) | positions.astype(np.int64)
    return np.where(positions < 0, EMPTY, packed)


def steps_of(packed: NDArray[np.int64]) -> NDArray[np.int64]:
    """The score in steps of each rank; of `EMPTY` a number below every score."""
    return -(packed >> 32)


def best(packed_QC: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """The k best ranks of each row in order, padded with `EMPTY`."""
    if packed_QC.shape[1] > k:
        packed_QC = np.partition(packed_QC, k - 1, axis=1)[:, :k]
    ordered = np.sort(packed_QC, axis=1)
    if ordered.shape[1] == k:
        return ordered
    return np.pad(ordered, ((0, 0), (0, k - ordered.shape[1])), constant_values=EMPTY)


def unpack(
    packed_Qk: NDArray[np.int64], present: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Class ids int32 and scores float32 of ranks; -1 and -inf where there is nobody."""
    empty = packed_Qk == EMPTY
    positions = np.where(empty, 0, packed_Qk & 0xFFFFFFFF)
    ids = np.where(empty, NO_NEIGHBOUR, present[positions]).astype(np.int32)
    scores = np.where(empty, -np.inf, steps_of(packed_Qk) / STEPS).astype(np.float32)
    return ids, scores
