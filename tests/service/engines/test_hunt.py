"""A random hunt for wrong rows: every engine and path, odd shapes, all dtypes, both keys, against float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from nearkin_service.engines import BuildRequest, build_table
from nearkin_service.engines.pacing import Silence
from numpy.typing import NDArray

from tests.service.engines.oracle import assert_agrees, true_scores
from tests.service.engines.test_exact import needs_mixed

COUNTS = [2, 3, 4, 7, 17, 31, 32, 33, 65, 100, 127, 255, 257, 512, 513, 767, 1023, 1025, 1500, 2049, 3000]
SIZES = [
    8,
    11,
    13,
    31,
    32,
    33,
    61,
    64,
    97,
    128,
    251,
    256,
    509,
    512,
    1021,
    2048,
    2053,
    4099,
    12544,
    25087,
    25088,
]
DTYPES = [np.float32, np.float32, np.float16, ml_dtypes.bfloat16]
PATHS = [  # products, places of all sieves together, classes computed at once, elements in panels
    ("int16", 1 << 26, 0, 0),
    ("bfloat16", 1 << 26, 0, 0),
    ("int16", 1, 0, 0),
    ("bfloat16", 1, 0, 0),
    ("int16", 1, 5000, 0),
    ("int16", 1, 0, 1 << 30),
]
Rows = NDArray[np.float32]


def near_ties(random: np.random.Generator, rows: Rows) -> Rows:
    groups = max(1, len(rows) // int(random.integers(2, 60)))
    return rows[random.integers(0, groups, len(rows))] * (1 + np.float32(1e-7) * rows)


def clusters(random: np.random.Generator, rows: Rows) -> Rows:
    groups = int(random.integers(1, max(2, len(rows) // 3) + 1))
    return (
        rows[random.integers(0, groups, len(rows)) % len(rows)]
        + np.float32(10 ** random.uniform(-7, 0)) * rows
    )


def blocks(random: np.random.Generator, rows: Rows) -> Rows:
    groups = max(1, len(rows) // int(random.integers(2, 40)))
    return np.tile(rows[:groups], (len(rows) // groups + 1, 1))[: len(rows)]


def huge_component(random: np.random.Generator, rows: Rows) -> Rows:
    rows[np.arange(len(rows)), random.integers(0, 4, len(rows))] = np.float32(10 ** random.uniform(1, 8))
    return rows


def between_two_bfloat16(random: np.random.Generator, rows: Rows) -> Rows:
    wholes = random.integers(128, 256, rows.shape) + random.choice([0, 0.5, 0.4999, 0.5001, 0.25], rows.shape)
    return np.asarray(wholes * 2.0 ** random.integers(-40, 1, rows.shape) * np.sign(rows), np.float32)


def negative(random: np.random.Generator, rows: Rows) -> Rows:
    some = min(rows.shape)
    return (
        np.eye(some, rows.shape[1], dtype=np.float32)
        - np.float32(1 / some)
        + np.float32(random.choice([0, 1e-6, 1e-3])) * rows[:some]
    )


def denormal(random: np.random.Generator, rows: Rows) -> Rows:
    rows *= np.float32(10 ** random.uniform(-42, -36))
    rows[:, 0] = np.float32(random.choice([1, 1e-30, 1e-38])) * np.where(
        random.random(len(rows)) < 0.5, 1, -1
    )
    return rows


def integers(random: np.random.Generator, rows: Rows) -> Rows:
    return random.integers(-2, 3, rows.shape).astype(np.float32)


def positive(random: np.random.Generator, rows: Rows) -> Rows:
    return np.maximum(rows, 0) + np.float32(random.choice([0, 0.1, 3]))


def hubs(random: np.random.Generator, rows: Rows) -> Rows:
    rows[:, 0] = 0
    rows *= 0.8 / np.linalg.norm(rows, axis=1, keepdims=True)
    rows[:, 0] = 0.6
    rows[: int(random.integers(1, 4))] = np.eye(rows.shape[1], dtype=np.float32)[0]
    return rows


def one_hot(random: np.random.Generator, rows: Rows) -> Rows:
    return np.eye(rows.shape[1], dtype=np.float32)[random.integers(0, rows.shape[1], len(rows))]


def few_directions(random: np.random.Generator, rows: Rows) -> Rows:
    return rows[:, :3] @ random.standard_normal((3, rows.shape[1]), np.float32) + np.float32(1e-6) * rows


def ladder(random: np.random.Generator, rows: Rows) -> Rows:
    """Similarities to one direction that step down by about 1e-7."""
    steps = np.sqrt(2e-7 * np.arange(len(rows)) * random.uniform(0.1, 3))
    sideways = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows[0] / np.linalg.norm(rows[0]) + steps[:, None] * sideways, np.float32)


KINDS: list[Callable[[np.random.Generator, Rows], Rows]] = [
    near_ties, clusters, blocks, huge_component, between_two_bfloat16, negative, denormal, integers, positive,
    hubs, one_hot, few_directions, ladder, lambda random, rows: rows,
]  # fmt: skip


def prey(random: np.random.Generator) -> tuple[NDArray[Any], NDArray[np.int64], int, bool]:
    """Rows, absent classes, k, and whether the key is pooled."""
    count, size = int(random.choice(COUNTS)), int(random.choice(SIZES))
    while count * size > 2e7:
        size = int(random.choice(SIZES))
    kind = KINDS[int(random.integers(len(KINDS)))]
    rows = kind(random, random.standard_normal((count, size), dtype=np.float32))
    with np.errstate(all="ignore"):
        rows = rows.astype(DTYPES[int(random.integers(len(DTYPES)))])
    pooled = size % 4 == 0 and random.random() < 0.25
    exact = rows.astype(np.float64)
    exact = exact.reshape(len(rows), -1, 4).mean(axis=2) if pooled else exact
    absent = ~(np.isfinite(exact).all(axis=1) & exact.any(axis=1))
    if random.random() < 0.2:
        absent |= random.random(len(rows)) < 0.1
    ks = [1, 2, 10, 32, 64, len(rows) // 4, len(rows) // 2, len(rows) - 1]
    k = int(np.clip(random.choice(ks), 1, len(rows) - 1))
    return rows, np.flatnonzero(absent), k, pooled


@needs_mixed
@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100))
def test_no_wrong_row_is_found(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)
    scan = importlib.import_module("nearkin_service.engines.mixed.scan")
    for _ in range(4):
        rows, absent, k, pooled = prey(random)
        shape = (rows.shape[1] // 4, 2, 2) if pooled else (rows.shape[1],)
        key: Any = "pooled" if pooled else "flat"

        def build(engine: str) -> Any:
            return build_table(rows, BuildRequest(shape, key, k, engine, "cpu", absent), Silence())  # noqa: B023

        flat = build("flat")
        assert_agrees(flat, true_scores(rows, absent, shape if pooled else None))
        for products, places, at_once, panels in PATHS:
            monkeypatch.setattr(scan, "fastest_products", lambda products=products: products)
            monkeypatch.setattr("nearkin_service.engines.mixed.cpu._SIEVE_PLACES", places)
            monkeypatch.setattr("nearkin_service.engines.ways.AT_ONCE", at_once)
            monkeypatch.setattr("nearkin_service.engines.ways._PANEL_ELEMENTS", panels)
            mixed = build("mixed")
            assert mixed.ids.tobytes() == flat.ids.tobytes(), (products, places, at_once, panels)
            assert mixed.scores.tobytes() == flat.scores.tobytes(), (products, places, at_once, panels)
