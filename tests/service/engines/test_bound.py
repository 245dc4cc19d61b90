"""The bound that certificates rest on: what a tile holds is as near to the true scores as it says."""

from __future__ import annotations

import numpy as np
import pytest
from nearkin_service.engines import auto
from nearkin_service.engines.pacing import Silence

pytestmark = pytest.mark.skipif(
    auto.mixed_packages_missing() is not None, reason="nearkin-service[mixed] is not installed"
)


def _rows(kind: str, size: int) -> np.ndarray:
    random = np.random.default_rng(size)
    rows = {
        "random": random.standard_normal((150, size)),
        "one sign": 1 + 0.01 * random.random((150, size)),  # sums that only grow, and round alike
        "falling": np.exp(-np.arange(size) / (size / 30)) * (1 + 0.1 * random.random((150, size))),
        "one huge": np.where(np.arange(size) == size // 2, 1e3, random.standard_normal((150, size))),
    }[kind]
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["random", "one sign", "falling", "one huge"])
@pytest.mark.parametrize("size", [7, 512, 513, 3000, 25_088])
def test_products_are_within_the_bound(
    size: int, kind: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nearkin_service.engines.mixed import scan
    from nearkin_service.engines.mixed.rerank import as_scores

    monkeypatch.setattr(scan, "fastest_products", lambda: products)
    monkeypatch.setattr(scan, "_TILE_ROWS", 64)  # 150 rows are three blocks: tiles on the diagonal and off it
    monkeypatch.setattr(scan, "_TILE_ROWS_NARROW", 64)
    monkeypatch.setattr(scan, "_STRIP", 24)
    rows = _rows(kind, size)
    true = rows.astype(np.float64) @ rows.T.astype(np.float64)
    keys = scan.tile_keys(rows, Silence())
    sieve = scan.scan(keys, 149, (192, 0), Silence())
    for row in range(150):
        places = slice(sieve.starts[row], sieve.starts[row] + sieve.counts[row])
        held = sieve.ids[places]
        stored = sieve.fine[places] if len(sieve.fine) else as_scores(sieve.values[places])
        fine = stored.astype(np.float64)
        assert (np.abs(true[row, held] - fine) <= keys.errors[row] + sieve.rounding * fine).all()
        assert set(np.flatnonzero(true[row] > 2 * keys.errors[row])) - {row} <= set(held.tolist())


def test_the_bound_of_wide_float32_tiles_does_not_grow_with_the_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nearkin_service.engines.mixed import scan

    monkeypatch.setattr(scan, "fastest_products", lambda: "float32")
    wide, wider = (
        scan.tile_keys(np.zeros((40, size), np.float32), Silence()).errors[0] for size in (512, 25_088)
    )
    assert wider < 1.1 * wide < 4e-5
