"""Engine `mixed` on a GPU: its steps by torch on the CPU, everywhere, and on a GPU where torch sees one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from nearkin_service.engines import BuildRequest, BuiltTable, auto, build_table, ways
from nearkin_service.engines.contract import KeyName
from nearkin_service.engines.keys import KeyedRows
from nearkin_service.engines.pacing import Silence
from numpy.typing import NDArray

from tests.service.engines.cases import CASES
from tests.service.engines.oracle import assert_agrees, build, true_scores

pytestmark = pytest.mark.skipif(
    auto.mixed_packages_missing("cuda") is not None, reason="nearkin-service[mixed,torch] is not installed"
)
NOBODY = np.empty(0, np.int64)
_MOST_ON_CPU = 1 << 18


def _devices() -> list[Any]:
    try:
        import torch
    except ImportError:
        return []
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
    return ["cpu", pytest.param("cuda", marks=no_gpu)]


def joined(rows: NDArray[Any], k: int, device: str, absent: NDArray[np.int64] = NOBODY) -> BuiltTable:
    from nearkin_service.engines.mixed.gpu import build_on_gpu

    return build_on_gpu(KeyedRows(rows, (rows.shape[1],), "flat", absent), k, Silence(), device)


def assert_same(one: BuiltTable, other: BuiltTable) -> None:
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.scores, other.scores)


@pytest.mark.parametrize("device", _devices())
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_flat_bit_for_bit(name: str, device: str) -> None:
    rows, k = CASES[name](np.random.default_rng(12))
    if device == "cpu" and rows.size > _MOST_ON_CPU:
        pytest.skip("takes long without a GPU")
    assert_same(joined(rows, k, device), build(rows, k, "flat"))


@pytest.mark.parametrize("device", _devices())
@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
@pytest.mark.parametrize(("shape", "key"), [((33,), "flat"), ((8, 3, 2), "flat"), ((8, 3, 2), "pooled")])
def test_keys_are_the_same_bits_there(
    shape: tuple[int, ...], key: KeyName, dtype: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nearkin_service.engines.mixed import upload

    monkeypatch.setattr(upload, "_PIECE_BYTES", 20 * 4 * 33)
    monkeypatch.setattr("nearkin_service.engines.keys._BLOCK_ELEMENTS", 3 * 33)
    random = np.random.default_rng(5)
    scales = 10.0 ** random.integers(-3, 4, (107, 1))
    rows = (random.standard_normal((107, math.prod(shape))) * scales).astype(dtype)
    absent = np.array([0, 50, 106])
    rows[absent] = np.nan
    source = KeyedRows(rows, shape, key, absent)
    present = source.present()
    expected = source.keys_of(rows[present], present)
    on_host, on_device = upload.keys_on(device, source, present, Silence())
    np.testing.assert_array_equal(on_device.cpu().numpy(), expected)
    np.testing.assert_array_equal(on_host.whole(), expected)
    rows[77] = 0
    with pytest.raises(ValueError, match=r"class 77: its .* is zero"):
        upload.keys_on(device, source, present, Silence())


@pytest.mark.parametrize("device", _devices())
@pytest.mark.parametrize("size", [7, 512, 2049, 6000])
@pytest.mark.parametrize("kind", ["random", "one sign", "one huge", "tiny elements"])
def test_products_are_within_the_bound(kind: str, size: int, device: str) -> None:
    import torch
    from nearkin_service.engines.mixed.halves import HalfKeys

    random = np.random.default_rng(size)
    rows = {
        "random": random.standard_normal((150, size)),
        "one sign": 1 + 0.01 * random.random((150, size)),  # sums that only grow, and round alike
        "one huge": np.where(np.arange(size) == size // 2, 1e3, random.standard_normal((150, size))),
        "tiny elements": np.where(np.arange(size) < 3, 1, 1e-6 * random.standard_normal((150, size))),
    }[kind]
    keys = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    half = HalfKeys(torch.from_numpy(keys).to(device))
    values = half.products(np.arange(150))[:, :150].double().cpu().numpy()
    off = np.abs(values - keys.astype(np.float64) @ keys.T.astype(np.float64))
    assert (off <= half.errors[:, None]).all()
    assert half.errors.max() < 3e-3


@pytest.mark.parametrize("device", _devices())
def test_rows_in_doubt_look_at_more_and_then_at_everybody(device: str) -> None:
    """Clusters so close that float16 cannot tell their members apart, of more members than are looked at."""
    random = np.random.default_rng(3)
    sizes = [1000, 900, 300, 40]
    centres = np.repeat(random.standard_normal((4, 8)), sizes, axis=0)
    order = random.permutation(len(centres))
    rows = (centres + 1e-5 * random.standard_normal(centres.shape)).astype(np.float32)[order]
    table = joined(rows, 10, device)
    assert_same(table, build(rows, 10, "flat"))
    assert table.recomputed_rows > 0


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_small_table_is_right(data: Any) -> None:
    count = data.draw(st.integers(2, 200))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows = random.integers(-2, 3, (count, data.draw(st.integers(1, 9)))).astype(np.float32)
    rows[~rows.any(axis=1), 0] = 1
    absent = np.flatnonzero(random.random(count) < data.draw(st.sampled_from([0.0, 0.3, 1.0])))
    k = data.draw(st.integers(1, count - 1))
    table = joined(rows, k, "cpu", absent)
    request = BuildRequest((rows.shape[1],), "flat", k, "flat", "cpu", absent)
    assert_same(table, build_table(rows, request, Silence()))
    if not len(absent):
        assert_agrees(table, true_scores(rows))


def test_auto_says_why_a_table_is_not_built_by_torch_on_a_gpu() -> None:
    import torch

    engine, why = auto.choose("auto", ways.Job(100_000, 512, 32), "cuda")
    assert (engine == "mixed") == torch.cuda.is_available()
    if engine == "flat":
        assert "sees no GPU" in why
    assert auto.choose("auto", ways.Job(500, 512, 32), "cuda") == (
        "flat",
        "auto, since there are few classes",
    )


def test_named_without_a_gpu_it_fails_and_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU")
    rows = np.random.default_rng(0).standard_normal((100, 8), dtype=np.float32)
    with pytest.raises(ValueError, match=r"mixed cannot be used on cuda: torch .* sees no GPU"):
        joined(rows, 3, "cuda")
