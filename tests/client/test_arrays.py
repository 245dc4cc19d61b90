"""Whatever array it is, the bytes that leave are its rows, row-major and little-endian, in the wire dtype."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nearkin_client import InvalidArgument, arrays
from nearkin_client.arrays import WIRE_DTYPES, as_rows

SHAPES = [(5, 7), (4, 3, 2, 5)]
generator = np.random.default_rng(7)


def sent(values: Any, wire_dtype: str | None = None) -> bytes:
    rows = as_rows("embeddings", values, wire_dtype)
    middle = rows.count // 2
    return b"".join([rows.payload(0, middle), rows.payload(middle, rows.count)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("wire", [None, "float32", "float16", "bfloat16"])
def test_numpy_and_torch_send_the_same_bytes(shape: tuple[int, ...], dtype: str, wire: str | None) -> None:
    values = generator.standard_normal(shape)
    array = values.astype(WIRE_DTYPES.get(dtype, np.dtype("f8")))
    tensor = torch.from_numpy(values).to(getattr(torch, dtype))
    expected = WIRE_DTYPES[wire or (dtype if dtype in WIRE_DTYPES else "float32")]
    assert sent(array, wire) == array.astype(expected).tobytes()
    assert sent(tensor, wire) == sent(array, wire)


@pytest.mark.parametrize("wire", ["float16", "bfloat16"])
@pytest.mark.parametrize("writable", [True, False])
def test_every_number_is_rounded_to_the_nearest_with_torch_and_without(wire: str, *, writable: bool) -> None:
    bits = np.concatenate([generator.integers(0, 1 << 32, 1 << 20), np.arange(0x3300_0000, 0x3900_0000, 97)])
    values = bits.astype(np.uint32).view(np.float32)
    halves = np.arange(1 << 16, dtype=np.uint16).view(WIRE_DTYPES[wire]).astype(np.float32)
    with np.errstate(all="ignore"):
        between = (halves[1:].astype(np.float64) + halves[:-1]).astype(np.float32) / 2
        rows = np.concatenate([values, halves, between])
        rows = rows[np.isfinite(rows)][:, None]
        rows.flags.writeable = writable
        expected = rows.astype(WIRE_DTYPES[wire])
    assert sent(rows, wire) == expected.tobytes()


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(generator.standard_normal((6, 8)).astype("f4")[:, ::2], id="strided"),
        pytest.param(generator.standard_normal((4, 6)).astype("f4").T, id="transposed"),
        pytest.param(generator.standard_normal((6, 4)).astype("f4")[::-1], id="reversed"),
        pytest.param(generator.standard_normal((6, 4)).astype(">f4"), id="big-endian"),
        pytest.param(np.asfortranarray(generator.standard_normal((6, 4)).astype("f4")), id="fortran"),
        pytest.param(generator.standard_normal((6, 4)).tolist(), id="lists"),
    ],
)
def test_layout_does_not_matter(values: Any) -> None:
    assert sent(values) == np.ascontiguousarray(values, "<f4").tobytes()


def test_tensors_that_need_gradients_or_are_not_contiguous() -> None:
    maps = torch.randn(3, 4, 5, 2, requires_grad=True).permute(0, 3, 1, 2)
    assert sent(maps) == maps.detach().contiguous().numpy().tobytes()
    parameter = torch.nn.Parameter(torch.randn(4, 3))
    assert sent(parameter) == parameter.detach().numpy().tobytes()


@pytest.mark.parametrize("wire", [None, "float16"])
def test_tensors_that_are_negated_when_they_are_read(wire: str | None) -> None:
    values = torch.randn(3, 4)
    lazily = torch.complex(torch.zeros(3, 4), -values).conj().imag
    assert lazily.is_neg()
    assert sent(lazily, wire) == sent(values, wire)


def test_a_mask_that_hides_nothing_is_none() -> None:
    values = np.ones((3, 4), np.float32)
    assert sent(np.ma.masked_array(values)) == values.tobytes()


def test_contiguous_rows_leave_from_where_they_lie() -> None:
    array = np.ones((4, 3), np.float32)
    payload = as_rows("embeddings", array, None).payload(1, 3)
    array[2, 0] = 5
    assert np.frombuffer(payload, np.float32)[3] == 5


def test_bfloat16_rounds_to_nearest_even() -> None:
    values = np.array([[1.00390625, 1.01171875]], np.float32)
    expected = values.astype(ml_dtypes.bfloat16).tobytes()
    assert sent(values, "bfloat16") == expected == sent(torch.from_numpy(values), "bfloat16")


@pytest.mark.parametrize(
    ("values", "wire", "field"),
    [
        (np.ones((3, 4), np.int32), None, "embeddings.dtype"),
        (torch.ones(3, 4, dtype=torch.int64), None, "embeddings.dtype"),
        (np.ones((3, 4), np.complex64), None, "embeddings.dtype"),
        (np.array([["a", "b"]]), None, "embeddings.dtype"),
        (np.ones(3, np.float32), None, "embeddings.shape"),
        (np.ones((3, 4, 5), np.float32), None, "embeddings.shape"),
        (np.ones((3, 0), np.float32), None, "embeddings.shape"),
        (np.ones((3, 4), np.float32), "float8", "wire_dtype"),
        (torch.ones(3, 4).to_sparse(), None, "embeddings.layout"),
        (torch.ones(3, 4).to_sparse(), "float16", "embeddings.layout"),
        (torch.ones(3, 4).to_sparse_csr(), "float16", "embeddings.layout"),
        (torch.nested.nested_tensor([torch.ones(3), torch.ones(4)]), None, "embeddings.layout"),
        (torch.ones(3, 4, device="meta"), None, "embeddings.device"),
        (torch.ones(3, 4, device="meta"), "float16", "embeddings.device"),
        ([[1.0, 2.0], [3.0]], None, "embeddings"),
        (np.ma.masked_equal(np.ones((3, 4), np.float32), 1), None, "embeddings"),
    ],
)
def test_what_cannot_be_sent_is_named(values: Any, wire: str | None, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        as_rows("embeddings", values, wire)
    assert caught.value.field == field
    assert field in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_tensors() -> None:
    tensor = torch.randn(5, 3, device="cuda", dtype=torch.bfloat16)
    assert sent(tensor) == sent(tensor.cpu())


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
@pytest.mark.parametrize("width", [1, 8, 900])
@given(data=st.data())
def test_rows_are_called_sound_only_if_they_are(dtype: str, width: int, data: st.DataObject) -> None:
    """A piece may be called unsound wrongly (then the service looks), never sound."""
    values = np.random.default_rng(3).standard_normal((5, width)).astype(WIRE_DTYPES[dtype])
    for row in data.draw(st.sets(st.integers(0, 4))):
        odd = data.draw(st.sampled_from([0.0, -0.0, np.nan, np.inf, -np.inf]))
        where = slice(None) if odd == 0 else data.draw(st.integers(0, width - 1))
        values[row, where] = odd
    numbers = values.astype(np.float64)
    fine = np.isfinite(numbers).all() and (numbers != 0).any(axis=1).all()
    rows = as_rows("embeddings", values, None)
    pieces = list(rows.pieces(0, 5))
    assert b"".join(pieces) == values.tobytes()
    assert all(arrays.sound(piece, rows) for piece in pieces) == fine


def test_a_row_larger_than_a_piece_is_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "PIECE_BYTES", 256)
    values = np.ones((2, 100), np.float32)
    rows = as_rows("embeddings", values, None)
    assert [len(piece) for piece in rows.pieces(0, 2)] == [256, 144, 256, 144]
    assert all(arrays.sound(piece, rows) for piece in rows.pieces(0, 2))
    values[1, 99] = np.nan
    assert [arrays.sound(piece, rows) for piece in rows.pieces(0, 2)] == [True, True, True, False]


def test_pieces_hold_whole_rows_if_more_than_a_piece_is_converted_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, whose blocks are larger."""
    monkeypatch.setattr(arrays, "PIECE_BYTES", 1000)
    monkeypatch.setattr(arrays._Described, "_block_bytes", lambda self: 4000)
    values = np.ones((25, 100), np.float32)
    rows = as_rows("embeddings", values, None)
    pieces = list(rows.pieces(0, 25))
    assert {len(piece) for piece in pieces} == {800, 400}
    assert b"".join(pieces) == values.tobytes()
    assert all(arrays.sound(piece, rows) for piece in pieces)


ODD = {"float32": 1e-41, "float16": 6e-8, "bfloat16": 1e-40}  # denormal: squares vanish


@given(st.data())
def test_a_look_finds_what_is_not_finite_and_rows_of_zeros(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(sorted(WIRE_DTYPES)))
    count, width = data.draw(st.integers(1, 12)), data.draw(st.sampled_from([1, 2, 15, 16, 17, 40]))
    values = generator.standard_normal((count, width)).astype(WIRE_DTYPES[dtype])
    values[values == 0] = 1
    for row in data.draw(st.lists(st.integers(0, count - 1), max_size=2)):
        values[row] = data.draw(st.sampled_from([0.0, -0.0, ODD[dtype]]))
        if data.draw(st.booleans()):  # a row may begin with many zeros
            values[row, -1] = 1
    for row in data.draw(st.lists(st.integers(0, count - 1), max_size=1)):
        values[row, data.draw(st.integers(0, width - 1))] = data.draw(
            st.sampled_from([np.nan, np.inf, -np.inf])
        )
    plain = values.astype(np.float64)
    expected = bool(np.isfinite(plain).all() and (plain != 0).any(axis=1).all())
    rows = as_rows("embeddings", values, dtype)
    assert arrays.sound(rows.payload(0, count), rows) == expected


def test_a_look_leaves_what_it_cannot_tell_to_the_service() -> None:
    values = np.full((2, 8), 3e19, np.float32)  # finite, and squares that are not
    rows = as_rows("embeddings", values, None)
    assert not arrays.sound(rows.payload(0, 2), rows)
