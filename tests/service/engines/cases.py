"""Rows that are hard to get exactly right, by name: each gives rows [N, D] and k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Case = tuple[NDArray[Any], int]
CASES: dict[str, Callable[[np.random.Generator], Case]] = {}


def _case(function: Callable[[np.random.Generator], Case]) -> Callable[[np.random.Generator], Case]:
    CASES[function.__name__] = function
    return function


def _random(random: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return random.standard_normal(shape, dtype=np.float32)


@_case
def unstructured(random: np.random.Generator) -> Case:
    return _random(random, 1500, 48), 12


@_case
def clustered(random: np.random.Generator) -> Case:
    centres = _random(random, 30, 64)
    return centres[random.integers(0, 30, 1500)] + 0.2 * _random(random, 1500, 64), 20


@_case
def all_rows_identical(random: np.random.Generator) -> Case:
    return np.repeat(_random(random, 1, 40), 1100, axis=0), 9


@_case
def exact_duplicates_in_blocks(random: np.random.Generator) -> Case:
    return np.tile(_random(random, 60, 32), (20, 1)), 25


@_case
def scaled_duplicates(random: np.random.Generator) -> Case:
    scale = np.exp2(random.integers(-20, 20, 1200)).astype(np.float32)
    return np.repeat(_random(random, 300, 24), 4, axis=0) * scale[:, None], 6


@_case
def one_hot_all_tie_at_zero(random: np.random.Generator) -> Case:
    return np.eye(1030, dtype=np.float32), 8


@_case
def one_hot_with_repeats(random: np.random.Generator) -> Case:
    return np.eye(64, dtype=np.float32)[random.integers(0, 64, 1200)], 30


@_case
def one_class_far_from_all(random: np.random.Generator) -> Case:
    rows = np.abs(_random(random, 1100, 32)) + 1
    rows[17] = -rows[17]
    return rows, 10


@_case
def simplex_all_similarities_negative(random: np.random.Generator) -> Case:
    rows = np.eye(1024, dtype=np.float32) - np.float32(1 / 1024)
    return rows, 16


@_case
def one_huge_component(random: np.random.Generator) -> Case:
    rows = _random(random, 1200, 96)
    rows[np.arange(1200), random.integers(0, 4, 1200)] = 1e4
    return rows, 20


@_case
def near_ties_at_the_kth_place(random: np.random.Generator) -> Case:
    base = _random(random, 40, 128)
    rows = np.repeat(base, 30, axis=0)
    return rows * (1 + 1e-7 * _random(random, 1200, 128)), 15


@_case
def near_ties_a_little_apart(random: np.random.Generator) -> Case:
    base = _random(random, 12, 200)
    return np.repeat(base, 100, axis=0) + 2e-3 * _random(random, 1200, 200), 40


@_case
def tiny_after_normalisation(random: np.random.Generator) -> Case:
    rows = _random(random, 1100, 80) * np.float32(1e-38)
    rows[:, 0] = random.choice(np.array([1, -1], np.float32), 1100)
    rows[:, 1] = np.float32(1e-3) * _random(random, 1100)
    return rows, 10


@_case
def huge_and_tiny_rows(random: np.random.Generator) -> Case:
    scale = np.where(np.arange(1100) % 2, 1e30, 1e-36).astype(np.float32)
    return _random(random, 1100, 40) * scale[:, None], 10


@_case
def one_class_equally_near_to_all(random: np.random.Generator) -> Case:
    rows = _random(random, 1500, 128)
    rows[:, 0] = 0
    rows *= 0.8 / np.linalg.norm(rows, axis=1, keepdims=True)
    rows[:, 0] = 0.6
    rows[5] = np.eye(128, dtype=np.float32)[0]
    return rows, 4


@_case
def one_element(random: np.random.Generator) -> Case:
    return np.where(_random(random, 1050, 1) > 0, np.float32(2), np.float32(-3)), 7


@_case
def two_classes(random: np.random.Generator) -> Case:
    return _random(random, 2, 5), 1


@_case
def every_other_class(random: np.random.Generator) -> Case:
    return _random(random, 1040, 16), 1039


@_case
def k_beyond_a_gpus_limit(random: np.random.Generator) -> Case:
    return _random(random, 2300, 12), 2200


@_case
def wide_rows(random: np.random.Generator) -> Case:
    return _random(random, 1003, 25088), 8


@_case
def wide_near_ties(random: np.random.Generator) -> Case:
    rows = np.repeat(_random(random, 25, 2053), 24, axis=0)
    return rows * (1 + 1e-7 * _random(random, 600, 2053)) + 1e-5 * _random(random, 600, 2053), 11


@_case
def wide_clusters(random: np.random.Generator) -> Case:
    centres = _random(random, 12, 3001)
    return centres[random.integers(0, 12, 700)] + 0.5 * _random(random, 700, 3001), 20


@_case
def float16_rows(random: np.random.Generator) -> Case:
    return _random(random, 1100, 33).astype(np.float16), 11


@_case
def bfloat16_rows(random: np.random.Generator) -> Case:
    return _random(random, 1100, 65).astype(ml_dtypes.bfloat16), 11


@_case
def positive_features(random: np.random.Generator) -> Case:
    return np.maximum(_random(random, 1300, 256) + 0.5, 0), 32
