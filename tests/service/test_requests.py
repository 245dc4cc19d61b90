"""Requests are what protobuf says they are, however their bulk is read."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service.errors import InvalidArgumentError
from nearkin_service.ranges import RowSet
from nearkin_service.store import journal
from nearkin_service.wire import requests

from tests.service.flooding import field_of

ids = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 300)
begin, nearest = requests.reader(pb.BeginPushRequest), requests.reader(pb.NearestRequest)
pieces = st.lists(
    st.lists(ids).map(lambda some: pb.BeginPushRequest(absent=some).SerializeToString())
    | ids.map(lambda one: b"\x50" + pb.BeginPushRequest(epoch=one or 1).SerializeToString()[1:])
    | st.sampled_from([b"\x10\x05", b"\x1a\x02hi", field_of(1, b"run"), b"\xfd\x7f1234", b"\x0b\x0c"])
    | st.binary(max_size=6),
    max_size=6,
).map(b"".join)


@given(pieces)
def test_absent_classes_are_those_of_protobuf(raw: bytes) -> None:
    try:
        expected = pb.BeginPushRequest.FromString(raw)
    except DecodeError:
        with pytest.raises((DecodeError, InvalidArgumentError)):
            begin(raw).absent()
        return
    found = begin(raw)
    # Numbers that come in both ways keep their sets, not their order.
    assert sorted(found.absent().tolist()) == sorted(expected.absent)
    del found.message.absent[:], expected.absent[:]
    assert found.message == expected


queries = st.lists(
    st.sampled_from(
        [
            field_of(5, b"\x08\x03" + field_of(15, b"abc")),
            field_of(5, field_of(15, b"abc") + b"\x10\x01" + field_of(15, b"de")),
            field_of(5, b""),
            field_of(4, field_of(1, b"\1\2")),
            field_of(1, b"run"),
        ]
    )
    | st.binary(max_size=5),
    max_size=5,
).map(b"".join)


@given(queries)
def test_vectors_are_those_of_protobuf(raw: bytes) -> None:
    try:
        expected = pb.NearestRequest.FromString(raw)
    except DecodeError:
        with pytest.raises(DecodeError):
            nearest(raw)
        return
    found = nearest(raw)
    assert found.message.WhichOneof("query") == expected.WhichOneof("query")
    if expected.WhichOneof("query") == "vectors":
        assert bytes(found.payload) == expected.vectors.payload
        found.message.vectors.payload = expected.vectors.payload
    assert found.message == expected


def test_bulk_that_is_none_is_refused_unread() -> None:
    for raw in (b"\x50\x01" * (1 << 20), b"\x4a\x00" * (1 << 20), field_of(1, bytes(2 << 20))):
        with pytest.raises(InvalidArgumentError, match="at most 1,048,576 are read"):
            begin(raw)


@given(st.lists(st.integers(0, 2**31 - 1), max_size=40))
def test_many_records_are_written_as_one_by_one(rows: list[int]) -> None:
    found = RowSet.from_ids(np.array(rows, np.int64))
    one_by_one = b"".join(each.packed() for each in journal.records_of(journal.Kind.ABSENT, found))
    assert journal.packed(journal.Kind.ABSENT, found) == one_by_one
