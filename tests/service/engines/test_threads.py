"""While a build's own threads multiply, NumPy's library has one thread for each; then its own again."""

from __future__ import annotations

import numpy as np
import pytest
from nearkin_service.engines import auto
from nearkin_service.engines.qaconv import LocationScore
from nearkin_service.engines.threads import one_thread_each
from numpy.typing import NDArray
from threadpoolctl import threadpool_info

from tests.service.engines.oracle import build

generator = np.random.default_rng(0)


def matrix_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if "numpy" in library["filepath"]]


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_overlapping_builds_leave_the_library_as_it_was(first_to_end: int) -> None:
    np.ones((8, 8)) @ np.ones((8, 8))
    before = matrix_threads()
    assert before
    builds = [one_thread_each(), one_thread_each()]
    for each in builds:
        each.__enter__()
    assert set(matrix_threads()) == {1}
    builds[first_to_end].__exit__(None, None, None)
    assert set(matrix_threads()) == {1}
    builds[1 - first_to_end].__exit__(None, None, None)
    assert matrix_threads() == before


def test_maps_are_compared_by_one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, seen = LocationScore.scores, set()

    def noting(score: LocationScore, *maps: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.update(matrix_threads())
        return scores(score, *maps)

    monkeypatch.setattr(LocationScore, "scores", noting)
    rows = generator.standard_normal((20, 4 * 3 * 2), dtype=np.float32)
    build(rows, 5, "flat", key="qaconv", shape=(4, 3, 2))
    assert seen == {1}


@pytest.mark.skipif(
    auto.mixed_packages_missing() is not None, reason="nearkin-service[mixed] is not installed"
)
def test_products_of_panels_have_one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    from nearkin_service.engines.mixed import panels

    multiply, seen = panels.multiply, set()

    def noting(*arrays: NDArray[np.float32]) -> None:
        seen.update(matrix_threads())
        multiply(*arrays)

    monkeypatch.setattr(panels, "multiply", noting)
    build(generator.standard_normal((2100, 8), dtype=np.float32), 5, "mixed")
    assert seen == {1}
