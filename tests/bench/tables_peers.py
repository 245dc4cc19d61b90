"""What exact tables are measured beside; each takes normalised keys [N, D]."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch
from nearkin_service.engines import worker_count
from numpy.typing import NDArray

Found = tuple[float, NDArray[np.int64]]


def faiss_flat(keys: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys)
    ids: NDArray[np.int64] = index.search(keys, k + 1)[1]
    return ids


def matrix_topk(keys: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """What trainers do today: all similarities at once, then topk."""
    rows = torch.from_numpy(keys)
    similarity = rows @ rows.T
    similarity.fill_diagonal_(-torch.inf)
    return similarity.topk(k, dim=1).indices.numpy()


def hnswlib_graph(keys: NDArray[np.float32], k: int) -> Found:
    import hnswlib

    began = time.perf_counter()
    index = hnswlib.Index(space="ip", dim=keys.shape[1])
    index.init_index(max_elements=len(keys), ef_construction=200, M=16, random_seed=1)
    index.set_num_threads(worker_count())
    index.add_items(keys)
    index.set_ef(max(64, 2 * k))
    labels, _ = index.knn_query(keys, k=k + 1)
    return time.perf_counter() - began, without_self(labels.astype(np.int64), k)


def pynndescent_graph(keys: NDArray[np.float32], k: int) -> Found:
    from pynndescent import NNDescent

    def build(rows: NDArray[np.float32]) -> Any:
        index = NNDescent(rows, metric="dot", n_neighbors=k + 1, random_state=1, n_jobs=worker_count())
        return index.neighbor_graph[0]

    build(keys[: max(500, 3 * k)])  # it compiles too
    began = time.perf_counter()
    labels = build(keys)
    return time.perf_counter() - began, without_self(labels.astype(np.int64), k)


def without_self(labels: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    own = labels == np.arange(len(labels))[:, None]
    own[~own.any(axis=1), -1] = True
    others: NDArray[np.int64] = labels[~own].reshape(len(labels), -1)[:, :k]
    return others


APPROXIMATE: dict[str, Callable[[NDArray[np.float32], int], Found]] = {
    "hnswlib": hnswlib_graph,
    "pynndescent": pynndescent_graph,
}
