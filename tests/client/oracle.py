"""Neighbour tables by float64 brute force, and what it means to agree with them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

GAP = 1e-6
"""Exact engines may differ where the float64 gap at the k-th place is under this."""


def similarities(rows: NDArray[Any], key: str = "flat") -> NDArray[np.float64]:
    """Float64 scores [N, N] of rows as they arrived at the service; a class never meets itself."""
    values = np.asarray(rows, np.float64)
    if key == "pooled":
        values = values.mean(axis=(2, 3))
    flat = values.reshape(len(values), -1)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    scores = flat @ flat.T
    np.fill_diagonal(scores, -np.inf)
    return scores


def assert_is_table(ids: NDArray[np.int32], scores: NDArray[np.float32], truth: NDArray[np.float64]) -> None:
    """Every row holds the k best classes of the float64 truth, best first, and their scores."""
    count, k = ids.shape
    assert len(truth) == count
    best = -np.sort(-truth, axis=1)[:, :k]
    found = np.take_along_axis(truth, ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(found, best, atol=GAP, rtol=0)
    np.testing.assert_allclose(scores, found, atol=1e-5, rtol=0)
    assert all(len(set(row)) == k for row in ids.tolist())
