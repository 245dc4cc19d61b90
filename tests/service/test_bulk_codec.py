"""The bulk codec says what the generated classes say, about any bytes at all."""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import replace

import pytest
from crc32c import crc32c
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from nearkin.v1 import bulk
from nearkin.v1 import neighbours_pb2 as pb

int64s = st.integers(-(2**63), 2**63 - 1)
crcs = st.integers(0, 2**32 - 1)
payloads = st.binary(max_size=300)
push_ids = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
write_rows = st.builds(
    pb.WriteRowsRequest,
    push_id=push_ids,
    row_start=int64s,
    shared_row_count=int64s,
    crc32c=st.none() | crcs,
    loan=push_ids,
    sound=st.booleans(),
    payload=payloads,
)
blocks = st.builds(
    pb.TableBlock,
    column=st.integers(0, 300),
    row_start=int64s,
    row_count=int64s,
    crc32c=crcs,
    payload=payloads,
)
headers = st.builds(
    pb.TableHeader, row_start=int64s, row_count=int64s, k=st.integers(0, 9), ids_path=push_ids
)


def as_generated(rows: bulk.WriteRows) -> pb.WriteRowsRequest:
    return pb.WriteRowsRequest(
        push_id=rows.push_id,
        row_start=rows.row_start,
        shared_row_count=rows.shared_row_count,
        crc32c=rows.crc32c,
        loan=rows.loan,
        sound=rows.sound,
        place_crc32c=rows.place_crc32c,
        payload=bytes(rows.payload),
    )


def table_as_generated(message: bulk.TableBlock | pb.TableHeader) -> pb.ReadTableResponse:
    if isinstance(message, pb.TableHeader):
        return pb.ReadTableResponse(header=message)
    return pb.ReadTableResponse(
        block=pb.TableBlock(
            column=message.column,  # type: ignore[arg-type]
            row_start=message.row_start,
            row_count=message.row_count,
            crc32c=message.crc32c,
            payload=bytes(message.payload),
        )
    )


def reparsed(message: pb.WriteRowsRequest) -> pb.WriteRowsRequest:
    message.DiscardUnknownFields()
    return message


@given(write_rows)
def test_decodes_what_the_generated_class_encodes(message: pb.WriteRowsRequest) -> None:
    assert as_generated(bulk.decode_write_rows(message.SerializeToString())) == message


@given(push_ids, int64s, int64s, st.none() | crcs, payloads)
def test_the_generated_class_decodes_what_we_encode(
    push_id: str, row_start: int, shared: int, crc: int | None, payload: bytes
) -> None:
    rows = bulk.WriteRows(push_id, row_start, memoryview(payload), crc, shared)
    encoded = bulk.encode_write_rows(rows)
    assert pb.WriteRowsRequest.FromString(encoded) == as_generated(replace(rows, place_crc32c=rows.place()))
    assert not bulk.decode_write_rows(encoded).misplaced
    assert encoded.endswith(payload)


@given(st.lists(write_rows, max_size=3), st.lists(blocks, max_size=2))
def test_concatenated_and_foreign_fields_agree(
    messages: list[pb.WriteRowsRequest], foreign: list[pb.TableBlock]
) -> None:
    """Protobuf lets encodings be concatenated; fields of another type's layout are unknown or clash."""
    data = b"".join(m.SerializeToString() for m in (*messages, *foreign))
    assert_write_rows_agree(data)


@given(st.binary(max_size=60))
def test_any_bytes_agree(data: bytes) -> None:
    assert_write_rows_agree(data)
    assert_table_agrees(data)


@given(write_rows, st.data())
def test_truncated_and_damaged_messages_agree(message: pb.WriteRowsRequest, data: st.DataObject) -> None:
    encoded = bytearray(message.SerializeToString())
    if encoded:
        encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= data.draw(st.integers(1, 255))
    assert_write_rows_agree(bytes(encoded[: data.draw(st.integers(0, len(encoded)))]))


@given(st.uuids(), st.integers(0, 2**40), st.binary(min_size=1, max_size=40), st.booleans())
def test_one_flipped_bit_moves_no_rows(
    push_id: uuid.UUID, row_start: int, payload: bytes, sound: bool
) -> None:
    sent = bulk.WriteRows(push_id.hex, row_start, memoryview(payload), crc32c(payload), sound=sound)
    data = bulk.encode_write_rows(sent)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(DecodeError):
            received = bulk.decode_write_rows(bytes(flipped))
            if received.push_id != sent.push_id or received.misplaced:
                continue
            assert (received.row_start, received.shared_row_count) == (row_start, 0)
            assert received.payload == payload or received.crc32c != crc32c(received.payload)


def test_fields_in_any_order() -> None:
    parts = [
        pb.WriteRowsRequest(payload=b"rows").SerializeToString(),
        pb.WriteRowsRequest(row_start=7).SerializeToString(),
        pb.WriteRowsRequest(push_id="p", crc32c=5).SerializeToString(),
    ]
    rows = bulk.decode_write_rows(b"".join(parts))
    assert (rows.push_id, rows.row_start, rows.crc32c, bytes(rows.payload)) == ("p", 7, 5, b"rows")


def test_the_payload_stays_where_it_lies() -> None:
    data = bulk.encode_write_rows(bulk.WriteRows("p", 0, memoryview(b"x" * 100)))
    assert bulk.decode_write_rows(data).payload.obj is data
    block = bulk.TableBlock(pb.TABLE_COLUMN_IDS, 0, 1, 9, memoryview(b"y" * 100))
    data = bulk.encode_table_message(block)
    decoded = bulk.decode_table_message(data)
    assert isinstance(decoded, bulk.TableBlock)
    assert decoded == block
    assert decoded.payload.obj is data


@given(blocks | headers)
def test_table_messages_decode(content: pb.TableBlock | pb.TableHeader) -> None:
    message = (
        pb.ReadTableResponse(block=content)
        if isinstance(content, pb.TableBlock)
        else pb.ReadTableResponse(header=content)
    )
    decoded = bulk.decode_table_message(message.SerializeToString())
    assert table_as_generated(decoded) == message
    assert pb.ReadTableResponse.FromString(bulk.encode_table_message(decoded)) == message


@given(st.lists(blocks | headers, min_size=1, max_size=3), payloads)
def test_merged_table_messages_agree(contents: list[pb.TableBlock | pb.TableHeader], tail: bytes) -> None:
    data = b"".join(
        (
            pb.ReadTableResponse(block=c) if isinstance(c, pb.TableBlock) else pb.ReadTableResponse(header=c)
        ).SerializeToString()
        for c in contents
    )
    assert_table_agrees(data)
    assert_table_agrees(data + tail)


def assert_write_rows_agree(data: bytes) -> None:
    try:
        expected = pb.WriteRowsRequest.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            bulk.decode_write_rows(data)
    else:
        assert as_generated(bulk.decode_write_rows(data)) == reparsed(expected)


def assert_table_agrees(data: bytes) -> None:
    try:
        expected = pb.ReadTableResponse.FromString(data)
        expected.DiscardUnknownFields()
        failed = expected.WhichOneof("content") is None
    except DecodeError:
        failed = True
    if failed:
        with pytest.raises(DecodeError):
            bulk.decode_table_message(data)
        return
    decoded = table_as_generated(bulk.decode_table_message(data))
    decoded.DiscardUnknownFields()
    assert decoded == expected
