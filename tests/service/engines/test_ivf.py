"""The approximate engine is as good as it says."""

from __future__ import annotations

import numpy as np
import pytest
from nearkin_service.engines import BuildCancelled, BuildRequest, build_table
from nearkin_service.engines.pacing import Silence

from tests.service.engines.oracle import assert_ordered, build


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    random = np.random.default_rng(3)
    centres = random.standard_normal((200, 32), dtype=np.float32)
    return centres[random.integers(0, 200, 12_000)] + 0.6 * random.standard_normal(
        (12_000, 32), dtype=np.float32
    )


@pytest.mark.parametrize("target", [0.8, 0.99])
def test_recall_is_measured_and_reached(rows: np.ndarray, target: float) -> None:
    request = BuildRequest((32,), "flat", 10, "ivf", "cpu", np.arange(5), target_recall=target)
    table = build_table(rows, request, Silence())
    truth = build(rows, 10, "flat", absent=np.arange(5))
    hits = [len(np.intersect1d(a, b)) for a, b in zip(table.ids[5:], truth.ids[5:], strict=True)]
    real = sum(hits) / truth.ids[5:].size
    assert table.recall is not None
    assert not table.exact
    assert real >= target - 0.01
    assert table.recall.low - 0.01 <= real <= table.recall.high + 0.01
    assert (table.ids[:5] == -1).all()
    assert not np.isin(table.ids, np.arange(5)).any()
    assert_ordered(table.ids, table.scores)


def test_probing_everything_is_exact_but_for_rounding(rows: np.ndarray) -> None:
    request = BuildRequest((32,), "flat", 5, "ivf", "cpu", np.empty(0, np.int64), target_recall=1.0)
    table = build_table(rows[:300], request, Silence())
    assert (table.ids == build(rows[:300], 5).ids).mean() > 0.99
    assert table.recall is not None
    assert table.recall.value > 0.99


@pytest.mark.parametrize("stage", ["train", "add", "tune", "search"])
def test_each_stage_can_be_cancelled(rows: np.ndarray, stage: str) -> None:
    class Impatient(Silence):
        def progress(self, named: str, rows_done: int, rows_total: int) -> None:
            self.reached = named == stage

        def check(self) -> None:
            if getattr(self, "reached", False):
                raise BuildCancelled(stage)

    request = BuildRequest((32,), "flat", 5, "ivf", "cpu", np.empty(0, np.int64))
    with pytest.raises(BuildCancelled, match=stage):
        build_table(rows[:3000], request, Impatient())


def test_no_row_is_left_to_compare(rows: np.ndarray) -> None:
    request = BuildRequest((32,), "flat", 5, "ivf", "cpu", np.arange(300))
    assert (build_table(rows[:300], request, Silence()).ids == -1).all()
