"""Pushing with key `qaconv`: its options reach the service; wrong ones are refused before a byte is sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nearkin_client import InvalidArgument, NeighbourClient

MAPS = np.random.default_rng(3).standard_normal((30, 4, 2, 2)).astype(np.float32)
WEIGHTS = np.array([5.0, 0, 0, 0, 1, 0, 0, 0])


def scores(weights: np.ndarray) -> np.ndarray:
    maps = MAPS.astype(np.float64).reshape(30, 4, 4)
    maps /= np.linalg.norm(maps, axis=1, keepdims=True)
    similar = np.einsum("pcr,ncs->pnrs", maps, maps)
    found: np.ndarray = np.concatenate([similar.max(axis=3), similar.max(axis=2)], axis=2) @ weights
    np.fill_diagonal(found, -np.inf)
    return found


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["mean", "weighted"])
def test_tables_and_queries_follow_the_location_wise_score(
    nearkin: NeighbourClient, weights: np.ndarray | None
) -> None:
    nearkin.push(MAPS, epoch=0, k=3, key="qaconv", qaconv_candidates=29, qaconv_weights=weights)
    table = nearkin.table(epoch=0, timeout=60)
    truth = scores(np.full(8, 1 / 8) if weights is None else weights)
    np.testing.assert_array_equal(table.ids, np.argsort(-truth, axis=1)[:, :3])
    assert nearkin.generation().key == "qaconv"
    np.testing.assert_array_equal(nearkin.nearest(classes=[4, 9], k=3).ids, table.ids[[4, 9]])


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"key": "flat", "qaconv_candidates": 9}, "qaconv_candidates"),
        ({"key": "pooled", "qaconv_weights": WEIGHTS}, "qaconv_weights"),
        ({"key": "qaconv", "qaconv_candidates": 2}, "qaconv_candidates"),
        ({"key": "qaconv", "qaconv_weights": WEIGHTS[:7]}, "qaconv_weights"),
        ({"key": "qaconv", "qaconv_weights": np.full(8, np.inf)}, "qaconv_weights"),
    ],
)
def test_what_is_wrong_is_named(nearkin: NeighbourClient, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        nearkin.push(MAPS, epoch=0, k=3, **arguments)
    assert caught.value.field == field
