"""Keys that are made from the rows when they are needed are those that are kept, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from nearkin_service.engines import auto
from nearkin_service.engines.keys import KeyedRows, fill_keys
from nearkin_service.engines.pacing import Silence

from tests.service.engines.oracle import assert_agrees, build, true_scores

pytestmark = pytest.mark.skipif(
    auto.mixed_packages_missing() is not None, reason="nearkin-service[mixed] is not installed"
)
SIZE = 2053


@pytest.mark.parametrize("absent", [[], [0, 3, 39]], ids=["all there", "some absent"])
def test_implied_keys_are_those_kept(absent: list[int]) -> None:
    from nearkin_service.engines.mixed.held import ImpliedKeys, KeptKeys
    from nearkin_service.engines.mixed.scan import keys_for_tiles

    random = np.random.default_rng(5)
    lengths = 10.0 ** random.integers(-30, 15, (40, 1))
    rows = (lengths * random.standard_normal((40, SIZE))).astype(np.float32)
    source = KeyedRows(rows, (SIZE,), "flat", np.array(absent, np.int64))
    present = source.present()
    keys_MD = np.empty((len(present), SIZE), np.float32)
    fill_keys(keys_MD, source, present, Silence())
    kept = KeptKeys(keys_MD)
    implied, _ = keys_for_tiles(source, present, Silence())
    assert isinstance(implied, ImpliedKeys)
    assert implied.shape == kept.shape
    for used in (slice(None), slice(4, 20), np.array([1, 2, 30])):
        parts = [np.empty((len(present[used]), 512), np.float32) for _ in range(2)]
        kept.copy_part(used, slice(700, 1212), parts[0])
        implied.copy_part(used, slice(700, 1212), parts[1])
        assert parts[0].tobytes() == parts[1].tobytes()
    assert all(kept[key].tobytes() == implied[key].tobytes() for key in range(len(present)))
    assert kept.whole().tobytes() == implied.whole().tobytes()


def test_rows_that_can_only_be_read_and_need_the_second_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nearkin_service.engines.ways.AT_ONCE", 0)
    monkeypatch.setattr("nearkin_service.engines.mixed.cpu.sieve_places", lambda count, k: (128, 0))
    random = np.random.default_rng(6)
    rows = np.repeat(random.standard_normal((3, SIZE)), 300, axis=0)
    rows = (rows + 1e-5 * random.standard_normal(rows.shape)).astype(np.float32)
    rows.flags.writeable = False
    table = build(rows, 9, "mixed")
    assert table.recomputed_rows > 0
    assert_agrees(table, true_scores(rows))
