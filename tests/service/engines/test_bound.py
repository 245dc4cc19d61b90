"""The bound that certificates rest on: what a tile holds is as near to the true scores as it says."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("products", ["int16", "bfloat16"])
@pytest.mark.parametrize("kind", ["random", "one sign", "falling", "one huge"])
@pytest.mark.parametrize("size", [7, 512, 513, 3000, 25_088])
def test_products_are_within_the_bound(
    size: int, kind: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nearkin_service.engines.mixed import rounded, scan, tiles
    from nearkin_service.engines.mixed.values import as_scores

    monkeypatch.setattr(scan, "fastest_products", lambda: products)
    monkeypatch.setattr(tiles, "_TILE_ROWS", 64)  # 150 rows are three blocks: on the diagonal and off it
    monkeypatch.setattr(tiles, "_TILE_ROWS_NARROW", 64)
    monkeypatch.setattr(rounded, "_STRIP", 24)
    rows = _rows(kind, size)
    true = rows.astype(np.float64) @ rows.T.astype(np.float64)
    keys = scan.tile_keys(rows, Silence())
    sieve, errors = scan.scan(keys, 149, (192, 0), Silence()), keys.errors
    for row in range(150):
        places = slice(sieve.starts[row], sieve.starts[row] + sieve.counts[row])
        held = sieve.ids[places]
        stored = as_scores(sieve.values[places], sieve.rounding)
        assert (np.abs(true[row, held] - stored) <= errors[row] + sieve.rounding * np.abs(stored)).all()
        seen = true[row] > (2 * errors[row] if sieve.rounding else -2)
        assert set(np.flatnonzero(seen)) - {row} <= set(held.tolist())


@pytest.mark.parametrize("kind", ["random", "one sign", "falling"])
@pytest.mark.parametrize("size", [7, 512, 25_088])
def test_fixed_point_leaves_less_in_doubt_than_bfloat16(size: int, kind: str) -> None:
    from nearkin_service.engines.mixed.fixed import FixedKeys
    from nearkin_service.engines.mixed.rounded import RoundedKeys

    rows = _rows(kind, size)
    errors = []
    for keys in (FixedKeys(150, size), RoundedKeys(150, size)):
        keys.put(0, rows)
        errors.append(float(keys.errors[:150].mean()))
    assert errors[0] < errors[1]


def test_products_of_the_longest_parts_fit_an_int32() -> None:
    from nearkin_service.engines.mixed.fixed import FixedKeys
    from nearkin_service.engines.mixed.values import STEPS

    rows = np.zeros((34, 1030), np.float32)
    rows[:, :2] = 2**-0.5  # the largest elements, in one pair
    rows[1::2] *= -1
    rows[:2] = 512**-0.5 * (np.arange(1030) < 512)  # the longest part
    keys = FixedKeys(34, 1030)
    keys.put(0, rows[:32])
    keys.put(32, rows[32:])
    true = rows.astype(np.float64) @ rows.T.astype(np.float64)
    tiles = [keys.multiplier().tile(0, left)[:32] / STEPS for left in (0, 1)]
    assert np.abs(np.hstack(tiles)[:, :34] - true[:32]).max() <= keys.errors.max()


def _has_avx512() -> bool:
    return "avx512bw" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86 processors")
@pytest.mark.parametrize(
    ("processor", "features"),
    [("haswell", "+avx2,+fma"), pytest.param("nehalem", "+sse4.2", marks=pytest.mark.soak)],
)
def test_products_as_compiled_for_a_processor_with_shorter_registers(processor: str, features: str) -> None:
    if "+avx2" in features and not _has_avx512():
        pytest.skip("the other tests run these loops here, or it does not have AVX2")
    told = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features}
    some = "within_the_bound and int16 and random and (7 or 513) or longest"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", some]
    done = subprocess.run(command, env=os.environ | told, capture_output=True, text=True, check=False)
    assert "3 passed" in done.stdout, done.stdout + done.stderr
