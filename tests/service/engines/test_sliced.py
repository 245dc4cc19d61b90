"""Long keys packed a slice at a time make the tiles of keys that are packed as a whole, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from nearkin_service.engines import auto
from nearkin_service.engines.contract import BuildCancelled
from nearkin_service.engines.keys import KeyedRows
from nearkin_service.engines.pacing import Silence

from tests.service.engines.oracle import assert_agrees, build, true_scores

pytestmark = pytest.mark.skipif(
    auto.mixed_packages_missing() is not None, reason="nearkin-service[mixed] is not installed"
)


@pytest.fixture(autouse=True)
def _slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nearkin_service.engines.mixed.scan.fastest_products", lambda: "int16")
    monkeypatch.setattr("nearkin_service.engines.mixed.sliced._WORTH_SLICING", 0)
    monkeypatch.setattr("nearkin_service.engines.mixed.tiles._TILE_ROWS", 96)
    monkeypatch.setattr("nearkin_service.engines.ways.AT_ONCE", 0)


def _rows(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(size).standard_normal((count, size), dtype=np.float32)


@pytest.mark.parametrize("absent", [[], [0, 3, 39]], ids=["all there", "some absent"])
@pytest.mark.parametrize("size", [2048, 2049, 8 * 512, 17 * 512 + 77])
def test_tiles_are_those_of_whole_keys(size: int, absent: list[int]) -> None:
    from nearkin_service.engines.mixed.fixed import FixedKeys
    from nearkin_service.engines.mixed.scan import keys_for_tiles
    from nearkin_service.engines.mixed.sliced import SlicedKeys

    source = KeyedRows(_rows(250, size), (size,), "flat", np.array(absent, np.int64))
    keys, sliced = keys_for_tiles(source, source.present(), Silence())
    assert isinstance(sliced, SlicedKeys)
    whole = FixedKeys(sliced.count, size)
    whole.put(0, keys.whole())
    sliced.prepare(Silence())
    assert sliced.errors.tobytes() == whole.errors.tobytes()
    first, second = sliced.multiplier(), whole.multiplier()
    for at in ((0, 0), (0, 1), (1, 2), (2, 2)):
        assert np.array_equal(first.tile(*at), second.tile(*at))


@pytest.mark.parametrize("count", [2, 33, 700])
def test_table(count: int) -> None:
    rows = _rows(count, 2501)
    rows[count // 2 :] = rows[0] + 0.01 * rows[count // 2 :]
    table = build(rows, min(7, count - 1), "mixed")
    assert_agrees(table, true_scores(rows))


def test_products_stop_when_the_build_is_cancelled() -> None:
    from nearkin_service.engines.mixed.scan import keys_for_tiles

    class Cancelled(Silence):
        def check(self) -> None:
            raise BuildCancelled("stopped")

    source = KeyedRows(_rows(200, 2500), (2500,), "flat", np.empty(0, np.int64))
    _, keys = keys_for_tiles(source, source.present(), Silence())
    with pytest.raises(BuildCancelled):
        keys.prepare(Cancelled())
