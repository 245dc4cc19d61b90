"""The one score of a pair of keys, the same wherever and however often it is computed.

A matrix product's last bits depend on where in the matrix a pair lies. So engines use products to *find*
candidates, and every score that leaves an engine is made here: the true inner product of the two float32
keys, rounded to a whole number of 2**-24 (each such number in [-1, 1] is a float32). A score and the id it
belongs to then fit one int64, a rank: ascending means highest score first, ties by lower id.

Dimension letters: Q queries, C candidates of a query, M keys, D elements of a key, k neighbours.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.contract import NO_NEIGHBOUR

STEPS = 1 << 24
"""Score steps between 0 and 1."""
_CHUNK = 4096
_GATHERED = 1 << 17  # elements at a time: they stay in cache
EMPTY = np.int64(np.iinfo(np.int64).max)
"""A rank that stands for nobody; sorts last."""


class Indexed(Protocol):
    """Keys that can be had one by one."""

    def __getitem__(self, key: Any, /) -> Any: ...


def in_steps(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Scores as whole numbers of 2**-24, within [-1, 1]."""
    return np.rint(np.clip(scores, -1.0, 1.0) * STEPS).astype(np.int64)


def doubtful_distance(terms: int) -> float:
    """How far from half a step a float64 product that saw so many roundings must be to be rounded safely."""
    return 1.01 * (terms + 2) * 2.0**-53 * STEPS


def settle_doubt(
    products_P: NDArray[np.float64],
    terms: int,
    first: tuple[Indexed, NDArray[np.integer[Any]]],
    second: tuple[Indexed, NDArray[np.integer[Any]]],
) -> NDArray[np.int64]:
    """The canonical steps of pairs, from float64 products that saw at most `terms` roundings on the way.

    `first` and `second` are the keys and, per pair, the row of its key. A sum of exact products is off by at
    most terms * 2**-53, so only a pair next to half a step can round the other way. Those few are summed
    without error.
    """
    steps_P = in_steps(products_P)
    distance_P = np.abs(np.clip(products_P, -1.0, 1.0) * STEPS - steps_P)
    for pair in np.flatnonzero(distance_P > 0.5 - doubtful_distance(terms)):
        keys = first[0][first[1][pair]], second[0][second[1][pair]]
        exact = math.fsum(np.multiply(*keys, dtype=np.float64).tolist())
        steps_P[pair] = in_steps(np.asarray(exact))
    return steps_P


def pair_steps(
    queries_QD: NDArray[np.float32], keys_MD: NDArray[np.float32], positions_QC: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The canonical score, in steps, of each query with the keys at its positions (-1: none, any value)."""
    others_QC = np.maximum(positions_QC, 0)
    products_QC = np.zeros(positions_QC.shape)
    size = keys_MD.shape[1]
    chunk = min(size, _CHUNK)
    step = max(1, _GATHERED // (max(1, positions_QC.shape[1]) * chunk))
    for top in range(0, len(queries_QD), step):
        some = slice(top, top + step)
        for left in range(0, size, chunk):
            part = slice(left, left + chunk)
            keys_QCD = keys_MD[others_QC[some], part].astype(np.float64)
            queries = queries_QD[some, part].astype(np.float64)
            products_QC[some] += np.matmul(keys_QCD, queries[:, :, None])[:, :, 0]
    owners_P = np.repeat(np.arange(len(queries_QD)), positions_QC.shape[1])
    terms = chunk + size // chunk + 1
    pairs = (queries_QD, owners_P), (keys_MD, others_QC.ravel())
    steps_P = settle_doubt(products_QC.ravel(), terms, *pairs)
    return steps_P.reshape(positions_QC.shape)


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
