"""Key `qaconv`: the top k' by pooled key, re-ranked by QAConv's location-wise score (Liao & Shao, ECCV 2020).

The score of maps p and c compares every location of one with every location of the other, each L2-normalised
over its channels: maxima = (for each location of p its best of c, then for each location of c its best of p).
The score is their mean, or their sum weighted by a head's weights [2 * H * W] in that order.

Dimension letters: N classes, Q queries, J candidates of a query, C channels, L locations (H * W),
k neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.contract import NO_NEIGHBOUR, BuildMonitor, Neighbours
from nearkin_service.engines.flat import FlatSearcher
from nearkin_service.engines.keys import KeyedRows
from nearkin_service.engines.pacing import Pace, Silence
from nearkin_service.engines.threads import one_thread_each
from nearkin_service.engines.workers import in_threads

CANDIDATES_PER_NEIGHBOUR = 8
"""k' = 8 k unless the request says otherwise; docs/PERFORMANCE.md shows what it was chosen by."""
_GATHERED = 1 << 23  # elements of candidates' maps at a time, per thread
_MAPS_AT_A_TIME = 64


def candidates_for(k: int, asked: int, most: int) -> int:
    """How many candidates by pooled key are re-ranked for k neighbours; `asked` 0 means the default."""
    return max(k, min(asked or CANDIDATES_PER_NEIGHBOUR * k, most))


@dataclass(frozen=True, slots=True)
class LocationScore:
    """How two feature maps are compared.

    Attributes:
        row_shape: `(C, H, W)`.
        weights: float32 [2 * H * W], or empty for the mean of the maxima.
    """

    row_shape: tuple[int, ...]
    weights: NDArray[np.float32]

    def __post_init__(self) -> None:
        """Raises ValueError if rows are no maps or the weights do not fit them."""
        if len(self.row_shape) != 3:
            raise ValueError(
                f"key: qaconv compares maps (C, H, W), not rows of shape {self.row_shape}; use flat"
            )
        wanted = 2 * self.row_shape[1] * self.row_shape[2]
        if self.weights.size not in (0, wanted):
            raise ValueError(f"qaconv_weights: {self.weights.size} values; send {wanted} (2 * H * W) or none")

    def maps(self, rows_NR: NDArray[Any]) -> NDArray[np.float32]:
        """float32 [N, C, L], every location normalised over its channels; an empty one stays zero."""
        maps_NCL = np.ascontiguousarray(rows_NR).astype(np.float64)
        maps_NCL = maps_NCL.reshape(len(maps_NCL), self.row_shape[0], -1)
        lengths = np.sqrt((maps_NCL * maps_NCL).sum(axis=1, keepdims=True))
        return (maps_NCL / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)

    def scores(self, map_CL: NDArray[np.float32], maps_JCL: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [J]: one map as p against each c; pair by pair, so that equal maps get equal scores."""
        similar_JLL = np.matmul(np.ascontiguousarray(map_CL.T), maps_JCL)
        maxima_J2L = np.concatenate([similar_JLL.max(axis=2), similar_JLL.max(axis=1)], axis=1)
        if not self.weights.size:
            return np.asarray(maxima_J2L.mean(axis=1, dtype=np.float64), np.float32)
        return np.asarray((maxima_J2L * self.weights.astype(np.float64)).sum(axis=1), np.float32)


def best_by_location(
    maps_QCL: Callable[[int], NDArray[np.float32]],
    maps_NCL: NDArray[np.float32],
    candidates_QJ: NDArray[np.int32],
    score: LocationScore,
    *,
    k: int,
    monitor: BuildMonitor,
) -> Neighbours:
    """The k best candidates of each query by location-wise score, ties by the lower id."""
    ids_Qk = np.full((len(candidates_QJ), k), NO_NEIGHBOUR, np.int32)
    scores_Qk = np.full(ids_Qk.shape, -np.inf, np.float32)
    step = max(1, _GATHERED // maps_NCL[0].size)

    def rerank(query: int) -> None:
        ids_J = candidates_QJ[query][candidates_QJ[query] >= 0]
        parts = [ids_J[start : start + step] for start in range(0, len(ids_J), step)]
        if not parts:
            return
        map_CL = maps_QCL(query)
        scores_J = np.concatenate([score.scores(map_CL, maps_NCL[part]) for part in parts])
        order = np.lexsort((ids_J, -scores_J))[:k]
        ids_Qk[query, : len(order)], scores_Qk[query, : len(order)] = ids_J[order], scores_J[order]

    pace = Pace(monitor, "rerank by location", len(ids_Qk))
    with one_thread_each():
        in_threads(rerank, range(len(ids_Qk)), pace.done)
    return Neighbours(ids_Qk, scores_Qk)


def all_maps(source: KeyedRows, score: LocationScore, monitor: BuildMonitor) -> NDArray[np.float32]:
    """Every class's map, float32 [N, C, L]; zeros for absent classes."""
    count, channels = len(source.rows), score.row_shape[0]
    maps_NCL = np.zeros((count, channels, source.rows.shape[1] // channels), np.float32)
    present = source.present()

    def convert(start: int) -> None:
        ids = present[start : start + _MAPS_AT_A_TIME]
        maps_NCL[ids] = score.maps(source.rows[ids])

    in_threads(convert, range(0, len(present), _MAPS_AT_A_TIME), lambda done: monitor.check())
    return maps_NCL


class LocationSearcher:
    """Nearest classes by location-wise score among the nearest by pooled key."""

    def __init__(self, source: KeyedRows, score: LocationScore, device: str, candidates: int = 0) -> None:
        self._candidates = candidates
        self._pooled = FlatSearcher(source, device)
        self._score = score
        self._maps_NCL = all_maps(source, score, Silence())

    @property
    def memory_bytes(self) -> int:
        """The pooled keys and the normalised maps."""
        return self._pooled.memory_bytes + self._maps_NCL.nbytes

    def nearest_to_classes(self, classes: NDArray[np.int64], k: int) -> Neighbours:
        """The k nearest classes of each class, never itself; rows of absent classes are -1 / -inf."""
        found = self._pooled.nearest_to_classes(classes, self._wider(k))
        return self._rerank(lambda query: self._maps_NCL[classes[query]], found, k)

    def nearest_to_vectors(self, vectors_QR: NDArray[Any], k: int) -> Neighbours:
        """The k nearest classes of each vector, laid out like a row; ValueError as for any key."""
        found = self._pooled.nearest_to_vectors(vectors_QR, self._wider(k))
        maps_QCL = self._score.maps(vectors_QR)
        return self._rerank(lambda query: maps_QCL[query], found, k)

    def _wider(self, k: int) -> int:
        return candidates_for(k, self._candidates, len(self._maps_NCL))

    def _rerank(self, maps: Callable[[int], NDArray[np.float32]], found: Neighbours, k: int) -> Neighbours:
        return best_by_location(maps, self._maps_NCL, found.ids, self._score, k=k, monitor=Silence())
