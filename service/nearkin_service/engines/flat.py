"""Engine `flat`: FAISS's exact inner-product index, completed to exact ties and fixed order.

Dimension letters: Q queries, C candidates of a query, N classes, M present classes (M <= N),
R elements of a row, D elements of a key, k neighbours.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.canonical import EMPTY, unpack
from nearkin_service.engines.complete import Queries, complete, exact_ranks
from nearkin_service.engines.contract import BuildMonitor, BuiltTable, Neighbours
from nearkin_service.engines.installed import faiss_version, gpu_count, load_faiss
from nearkin_service.engines.keys import KeyedRows, fill_keys
from nearkin_service.engines.pacing import BlockSize, Pace, Silence, blocks

SLACK = 8
"""Candidates asked for beyond the k-th, so that near-ties there rarely need a second pass."""
_GPU_MOST_CANDIDATES = 2048
_SMALL = 256  # keys: float64 at once costs less than a search and its completion
_LARGE_SHARE = 8  # likewise if this many times the candidates are all keys
_FIRST_BLOCK_PRODUCTS = {"cpu": 1 << 31, "cuda": 1 << 41}
_LEAST_BLOCK_ROWS, _MOST_BLOCK_ROWS = 32, 16384
_UNPACKED = 1 << 16  # ranks at a time: what becomes of them stays in cache


class FlatIndex:
    """`IndexFlatIP` over keys that the caller fills in place: `keys_MD`, then `ready()`, then searches."""

    def __init__(self, count: int, size: int, device: str) -> None:
        faiss = load_faiss()
        self._host = faiss.IndexFlatIP(size)
        self._host.codes.resize(count * size * 4)
        self._host.ntotal = count
        flat = faiss.rev_swig_ptr(self._host.get_xb(), count * size) if count else np.empty(0, np.float32)
        self.keys_MD: NDArray[np.float32] = flat.reshape(count, size)
        self._device = device
        self._searching: Any = self._host
        self._one_at_a_time = threading.Lock()

    @property
    def device(self) -> str:
        """Where it searches: "cpu", "cuda" or "cuda x<count>"."""
        if self._device == "cpu":
            return "cpu"
        return "cuda" if gpu_count() == 1 else f"cuda x{gpu_count()}"

    @property
    def most_candidates(self) -> int:
        """Candidates that one search can return."""
        return len(self.keys_MD) if self._device == "cpu" else _GPU_MOST_CANDIDATES

    def ready(self) -> None:
        """The keys are complete: copy them to the GPUs, if any."""
        if self._device == "cpu":
            return
        faiss = load_faiss()
        options = faiss.GpuMultipleClonerOptions()
        options.shard = True
        self._searching = faiss.index_cpu_to_all_gpus(self._host, co=options)

    def search(
        self, queries_QD: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores float32 [Q, count] in descending order and positions int64 [Q, count]."""
        if self._device == "cpu":
            scores_QC, positions_QC = self._searching.search(queries_QD, count)
        else:
            with self._one_at_a_time:
                scores_QC, positions_QC = self._searching.search(queries_QD, count)
        return scores_QC, positions_QC


def filled_index(source: KeyedRows, device: str, monitor: BuildMonitor) -> FlatIndex:
    """An index over the keys of the present classes, ready to search."""
    present = source.present()
    index = FlatIndex(len(present), source.key_size, device)
    fill_keys(index.keys_MD, source, present, monitor)
    index.ready()
    return index


def self_join(
    index: FlatIndex, k: int, monitor: BuildMonitor, spare: int = 0
) -> tuple[NDArray[np.int64], int]:
    """Ranks int64 [M, k + spare] of every key's nearest others, and how many rows needed the second pass."""
    count = len(index.keys_MD)
    ranks_Mk = np.full((count, k + spare), EMPTY)
    redone = 0
    pace = Pace(monitor, "search", count)
    first = _FIRST_BLOCK_PRODUCTS["cpu" if index.device == "cpu" else "cuda"]
    size = BlockSize(max(_LEAST_BLOCK_ROWS, first // max(1, index.keys_MD.size)), _MOST_BLOCK_ROWS)
    for some in blocks(count, size, pace):
        queries = Queries(index.keys_MD[some], np.arange(some.start, some.stop))
        ranks_Mk[some], again = nearest(index, queries, k, monitor, spare)
        redone += again
    return ranks_Mk, redone


def nearest(
    index: FlatIndex, queries: Queries, k: int, monitor: BuildMonitor, spare: int = 0
) -> tuple[NDArray[np.int64], int]:
    """Exact ranks int64 [Q, k + spare] of each query, and how many rows needed the second pass.

    Of the spare places, those that the first pass did not settle are `EMPTY`.
    """
    every = k + spare
    count = min(every + 1 + SLACK, len(index.keys_MD))
    if not count:
        return np.full((len(queries.own), every), EMPTY), 0
    if len(index.keys_MD) <= max(_SMALL, _LARGE_SHARE * count):
        return exact_ranks(queries, index.keys_MD, every, monitor), 0
    if count > index.most_candidates:
        return exact_ranks(queries, index.keys_MD, every, monitor), len(queries.own)
    return complete(queries, index.keys_MD, index.search(queries.keys, count), k, monitor, spare=spare)


def build_flat(source: KeyedRows, k: int, device: str, monitor: BuildMonitor, spare: int = 0) -> BuiltTable:
    """The exact neighbour table [N, k + spare] for keys `flat` and `pooled`; on "cpu" or "cuda"."""
    began = time.monotonic()
    index = filled_index(source, device, monitor)
    keyed = time.monotonic()
    ranks_Mk, redone = self_join(index, k, monitor, spare)
    ids, scores = spread(ranks_Mk, source.present(), len(source.rows))
    seconds = {"keys": keyed - began, "search": time.monotonic() - keyed}
    versions = {"faiss": faiss_version(), "numpy": np.__version__}
    return BuiltTable(ids, scores, "flat", index.device, True, redone, seconds, versions)


def spread(
    ranks_Mk: NDArray[np.int64], present: NDArray[np.int64], num_classes: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and scores of all classes from the ranks of the present ones; absent rows are -1 and -inf."""
    ids = np.full((num_classes, ranks_Mk.shape[1]), -1, np.int32)
    scores = np.full(ids.shape, -np.inf, np.float32)
    step = max(1, _UNPACKED // max(1, ranks_Mk.shape[1]))
    for start in range(0, len(present), step):
        some = present[start : start + step]
        ids[some], scores[some] = unpack(ranks_Mk[start : start + step], present)
    return ids, scores


class FlatSearcher:
    """Exact nearest classes of class ids and of vectors on one generation. Safe from several threads."""

    def __init__(self, source: KeyedRows, device: str) -> None:
        self._source = source
        self._present = source.present()
        self._index = filled_index(source, device, Silence())

    @property
    def memory_bytes(self) -> int:
        """The float32 keys in memory."""
        return self._index.keys_MD.nbytes

    def nearest_to_classes(self, classes: NDArray[np.int64], k: int) -> Neighbours:
        """The k nearest classes of each class, never itself; rows of absent classes are -1 / -inf."""
        count = len(self._source.rows)
        wrong = np.flatnonzero((classes < 0) | (classes >= count))
        if len(wrong):
            raise ValueError(f"classes[{wrong[0]}]: {classes[wrong[0]]} is not a class id in [0, {count})")
        ids = np.full((len(classes), k), -1, np.int32)
        scores = np.full(ids.shape, -np.inf, np.float32)
        here = np.flatnonzero(np.isin(classes, self._present))
        own_Q = np.searchsorted(self._present, classes[here])
        ids[here], scores[here] = self._answer(Queries(self._index.keys_MD[own_Q], own_Q), k)
        return Neighbours(ids, scores)

    def nearest_to_vectors(self, vectors_QR: NDArray[Any], k: int) -> Neighbours:
        """The k nearest classes of each vector, laid out like a row.

        Raises:
            ValueError: a wrong shape, or a vector with NaN or Inf or without direction.
        """
        size = math.prod(self._source.row_shape)
        if vectors_QR.ndim != 2 or vectors_QR.shape[1] != size:
            raise ValueError(f"vectors: shape {vectors_QR.shape} is not [Q, {size}]; lay each out like a row")
        keys_QD = self._source.keys_of(vectors_QR, np.arange(len(vectors_QR)), "vector")
        return Neighbours(*self._answer(Queries(keys_QD, np.full(len(keys_QD), -1)), k))

    def _answer(self, queries: Queries, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        if not len(queries.own):
            return np.empty((0, k), np.int32), np.empty((0, k), np.float32)
        ranks_Qk, _ = nearest(self._index, queries, k, Silence())
        return unpack(ranks_Qk, self._present)
