"""Builds report, stop when told, and refuse what they cannot do."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from nearkin_service.engines import (
    BuildCancelled,
    BuildRequest,
    auto,
    build_table,
    describe_engines,
    loading,
    open_searcher,
    resolve_device,
    ways,
)
from nearkin_service.engines.pacing import Silence

from tests.service.engines.oracle import assert_agrees, build, true_scores
from tests.service.engines.test_exact import ENGINES

NOBODY = np.empty(0, np.int64)


class Patience:
    """A monitor that gives up after so many seconds and remembers what it was told."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.began = time.monotonic()
        self.told: list[tuple[str, int, int]] = []

    def progress(self, stage: str, rows_done: int, rows_total: int) -> None:
        self.told.append((stage, rows_done, rows_total))

    def check(self) -> None:
        if time.monotonic() - self.began > self.seconds:
            raise BuildCancelled("out of time")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rows", ["random", "ties"])
def test_a_deadline_is_honoured(engine: str, rows: str) -> None:
    keys = np.random.default_rng(0).standard_normal((40_000, 256), dtype=np.float32)
    if rows == "ties":
        keys[:] = keys[0]
    build(keys[:2100], 8, engine)  # compiles
    monitor = Patience(0.3)
    with pytest.raises(BuildCancelled):
        build_table(keys, BuildRequest((256,), "flat", 32, engine, "cpu", NOBODY), monitor)
    assert time.monotonic() - monitor.began < 0.3 + 3.0, "within a second on idle cores"


@pytest.mark.parametrize("engine", ENGINES)
def test_progress_rises_to_the_total(engine: str) -> None:
    rows = np.random.default_rng(0).standard_normal((3000, 64), dtype=np.float32)
    monitor = Patience(300)
    build_table(rows, BuildRequest((64,), "flat", 8, engine, "cpu", NOBODY), monitor)
    for stage in dict.fromkeys(stage for stage, _, _ in monitor.told):
        done = [rows_done for named, rows_done, _ in monitor.told if named == stage]
        assert done == sorted(done)
        assert done[-1] == 3000
    assert {total for _, _, total in monitor.told} == {3000}


@pytest.mark.parametrize(("classes", "k"), [(20, 3), (20, 19), (2100, 20), (2100, 600)])
def test_auto_says_what_and_why(classes: int, k: int, caplog: pytest.LogCaptureFixture) -> None:
    if not auto.mixed_lacks():
        loading.wait(ways.Job(classes, 8, k))
    with caplog.at_level(logging.INFO, "nearkin.engines"):
        table = build(np.random.default_rng(0).standard_normal((classes, 8), dtype=np.float32), k, "auto")
    if auto.mixed_lacks():
        assert table.engine == "flat"
        assert "not installed" in caplog.text or "does not have" in caplog.text
    else:
        assert table.engine == ("flat" if k == 600 else "mixed")
        assert "each product once" in caplog.text or "more than a quarter" in caplog.text


@pytest.mark.parametrize(
    ("job", "engine"),
    [((256, 131_072, 10), "flat"), ((100, 2048, 64), "mixed"), ((512, 25_088, 32), "mixed")],
)
def test_auto_leaves_few_long_keys_to_flat(job: tuple[int, int, int], engine: str) -> None:
    if auto.mixed_lacks():
        pytest.skip("auto does not take engine mixed here")
    assert auto.choose("auto", ways.Job(*job), "cpu")[0] == engine


@pytest.mark.parametrize(
    ("flags", "engine"), [("fpu sse4_2 avx avx2 fma", "mixed"), ("fpu sse4_2 avx", "flat")]
)
def test_auto_asks_for_avx2(flags: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if auto.mixed_packages_missing():
        pytest.skip("nearkin-service[mixed] is not installed")
    monkeypatch.setattr(auto, "processor_flags", lambda: frozenset(flags.split()))
    auto.mixed_lacks.cache_clear()
    try:
        chosen, why = auto.choose("auto", ways.Job(20_000, 512, 32), "cpu")
    finally:
        auto.mixed_lacks.cache_clear()
    assert chosen == engine
    assert engine == "mixed" or "does not have avx2" in why


def test_a_quick_table_does_not_wait_for_compiled_loops(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if auto.mixed_lacks():
        pytest.skip("auto does not take engine mixed here")
    monkeypatch.setattr(loading, "_loaded", {"at once": threading.Event(), "scan": threading.Event()})
    monkeypatch.setattr(loading, "_loading", set())
    rows = np.random.default_rng(0).standard_normal((300, 8), dtype=np.float32)
    with caplog.at_level(logging.INFO, "nearkin.engines"):
        first = build(rows, 5, "auto")
    assert "are not loaded" in caplog.text
    loading.wait(ways.Job(300, 8, 5))
    second = build(rows, 5, "auto")
    assert (first.engine, second.engine) == ("flat", "mixed")
    assert first.ids.tobytes() == second.ids.tobytes()
    assert first.scores.tobytes() == second.scores.tobytes()


def test_auto_without_the_extra_is_flat_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "find_spec", lambda name: None)
    auto.mixed_lacks.cache_clear()
    rows = np.random.default_rng(0).standard_normal((1500, 16), dtype=np.float32)
    with caplog.at_level(logging.INFO, "nearkin.engines"):
        assert build(rows, 5, "auto").engine == "flat"
    assert "nearkin-service[mixed]" in caplog.text
    with pytest.raises(ValueError, match=r"nearkin-service\[mixed\]"):
        build(rows, 5, "mixed")
    auto.mixed_lacks.cache_clear()


_WITHOUT_TORCH = """
import sys
import numpy as np
sys.modules["torch"] = None  # importing it fails
from nearkin_service.engines import BuildRequest, build_table
from nearkin_service.engines.pacing import Silence

for classes, size, k in [(300, 40, 5), (2100, 16, 9), (2100, 600, 9)]:
    rows = np.random.default_rng(0).standard_normal((classes, size), dtype=np.float32)
    tables = [
        build_table(rows, BuildRequest((size,), "flat", k, engine, "cpu", np.empty(0, np.int64)), Silence())
        for engine in ("flat", "mixed")
    ]
    assert [table.engine for table in tables] == ["flat", "mixed"]
    assert tables[0].ids.tobytes() == tables[1].ids.tobytes()
    assert tables[0].scores.tobytes() == tables[1].scores.tobytes()
"""


def test_mixed_needs_no_torch_on_a_cpu() -> None:
    if auto.mixed_packages_missing():
        pytest.skip("nearkin-service[mixed] is not installed")
    subprocess.run([sys.executable, "-c", _WITHOUT_TORCH], check=True, timeout=200)


@pytest.mark.parametrize(
    ("flags", "torch_there", "says"),
    [
        ("avx2", True, "does not have amx_bf16"),
        ("avx2 amx_bf16", True, "times as fast as int16"),
        ("avx2 amx_bf16", False, r"nearkin-service\[torch\]"),
    ],
)
def test_tiles_are_bfloat16_only_where_a_trial_shows_it(
    flags: str,
    torch_there: bool,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if auto.mixed_packages_missing("cuda"):
        pytest.skip("nearkin-service[mixed,torch] is not installed")
    from nearkin_service.engines.mixed import quickest

    monkeypatch.setattr(quickest, "processor_flags", lambda: frozenset(flags.split()))
    monkeypatch.setattr(quickest, "find_spec", lambda name: torch_there or None)
    with caplog.at_level(logging.INFO, "nearkin.engines"):
        chosen = quickest.fastest_products.__wrapped__()
    assert re.search(says, caplog.text)
    assert chosen == "int16" or "amx_bf16" in flags


def test_mixed_on_a_gpu_names_the_extra_that_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "find_spec", lambda name: None if name == "torch" else name)
    with pytest.raises(ValueError, match=r"mixed cannot be used on cuda: torch .*nearkin-service\[torch\]"):
        auto.choose("mixed", ways.Job(20_000, 64, 5), "cuda")
    engine, why = auto.choose("auto", ways.Job(20_000, 64, 5), "cuda")
    assert engine == "flat"
    assert "nearkin-service[torch]" in why


def test_cuda_without_a_gpu_is_an_error() -> None:
    from nearkin_service.engines.installed import gpu_count

    if gpu_count():
        pytest.skip("there is a GPU here")
    with pytest.raises(ValueError, match="sees no GPU"):
        resolve_device("cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k: 0 is not in"),
        ({"k": 10}, "k: 10 is not in"),
        ({"engine": "fast"}, "engine: 'fast'"),
        ({"key": "best"}, "key: 'best'"),
        ({"device": "tpu"}, "device: 'tpu'"),
    ],
)
def test_requests_are_checked(change: dict[str, Any], message: str) -> None:
    given = {"row_shape": (4,), "key": "flat", "k": 3, "engine": "flat", "device": "cpu", "absent": NOBODY}
    with pytest.raises(ValueError, match=message):
        build_table(np.ones((10, 4), np.float32), BuildRequest(**{**given, **change}), Silence())


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "class 7.*NaN"), (np.inf, "class 7.*NaN"), (0.0, "class 7.*zero")]
)
def test_rows_without_a_direction_are_named(value: float, message: str) -> None:
    rows = np.ones((12, 4), np.float32)
    rows[7] = value
    with pytest.raises(ValueError, match=message):
        build(rows, 2)


def test_queries_agree_with_the_table() -> None:
    random = np.random.default_rng(6)
    rows = np.repeat(random.standard_normal((400, 20), dtype=np.float32), 2, axis=0)
    absent = np.array([5, 6, 700])
    table = build(rows, 9, absent=absent)
    searcher = open_searcher(rows, (20,), "flat", absent, "cpu")
    found = searcher.nearest_to_classes(np.arange(800), 9)
    np.testing.assert_array_equal(found.ids, table.ids)
    np.testing.assert_array_equal(found.scores, table.scores)
    assert searcher.memory_bytes >= 797 * 20 * 4
    by_vector = searcher.nearest_to_vectors(rows[[3, 9]] * 2, 2)
    np.testing.assert_array_equal(by_vector.ids, [[2, 3], [8, 9]])
    assert_agrees(table, true_scores(rows, absent))


@pytest.mark.parametrize("classes", [[-1], [800], [3, 900]])
def test_unknown_classes_are_refused(classes: list[int]) -> None:
    searcher = open_searcher(np.ones((800, 2), np.float32), (2,), "flat", NOBODY, "cpu")
    with pytest.raises(ValueError, match="not a class id"):
        searcher.nearest_to_classes(np.asarray(classes), 1)


def test_engines_describe_themselves() -> None:
    described = {engine.name: engine for engine in describe_engines()}
    assert described["flat"].available
    assert described["flat"].exact
    assert described["mixed"].reason


@pytest.mark.parametrize(
    ("job", "way"),
    [
        (ways.Job(1000, 512, 10), "at once"),
        (ways.Job(1000, 2048, 64), "by scanning"),
        (ways.Job(1000, 2048, 256), "at once"),
        (ways.Job(300, 2048, 10), "at once"),
        (ways.Job(600, 4096, 256), "by scanning"),
        (ways.Job(3000, 128, 64), "in panels"),
        (ways.Job(20_000, 512, 32), "by scanning"),
    ],
)
def test_small_tables_are_computed_at_once_unless_a_scan_leaves_much_out(job: ways.Job, way: str) -> None:
    assert ways.way_of(job) == way
