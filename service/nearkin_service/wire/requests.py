"""Unary requests taken apart without protobuf's looking at their bulk.

Protobuf reads a message in one go, during which nothing else moves in this process: a second for sixty
million numbers. So absent classes and vectors stay the bytes they came as until a thread has time for them;
what is left is small, or is refused unread. Any encoding of a small message is taken, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import Message
from nearkin.v1 import bulk
from nearkin.v1 import neighbours_pb2 as pb
from numpy.typing import NDArray

from nearkin_service.errors import InvalidArgumentError

MOST_BYTES = 1 << 20
"""Of a request, without its absent classes or vectors."""
_MOST_FIELDS = 100
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_ABSENT, _VECTORS, _PAYLOAD = 10, 5, 15
Some = TypeVar("Some", bytes, memoryview)
_PIECE_BYTES = 1 << 18
_MOST_VARINT = 10


@dataclass(frozen=True, slots=True)
class BeginPush:
    """A `BeginPushRequest` whose absent classes still are what arrived."""

    message: pb.BeginPushRequest
    packed: Sequence[memoryview]

    @property
    def run(self) -> str:
        return self.message.run

    @property
    def absent_bytes(self) -> int:
        return sum(each.nbytes for each in self.packed)

    def absent(self) -> NDArray[np.int64]:
        """InvalidArgumentError: not numbers. Meant for another thread than the event loop's."""
        return np.concatenate([np.array(self.message.absent, np.int64), *map(numbers, self.packed)])


@dataclass(frozen=True, slots=True)
class Nearest:
    """A `NearestRequest` whose vectors' payload lies where it arrived."""

    message: pb.NearestRequest
    payload: memoryview

    @property
    def run(self) -> str:
        return self.message.run


def reader(message_type: type[Message]) -> Callable[[bytes], Any]:
    """What takes requests of this type apart. DecodeError: it is none. InvalidArgumentError: too large."""
    if message_type is pb.BeginPushRequest:
        return _begin_push
    if message_type is pb.NearestRequest:
        return _nearest
    return lambda data: message_type.FromString(_small(data))


def _small(data: Some) -> Some:
    if len(data) > MOST_BYTES:
        raise InvalidArgumentError(
            "request",
            f"{len(data):,} bytes besides packed absent classes or vectors; at most {MOST_BYTES:,} are read",
        )
    return data


def _begin_push(data: bytes) -> BeginPush:
    found = _without(memoryview(data), _ABSENT)
    if found is None:
        return BeginPush(pb.BeginPushRequest.FromString(_small(data)), ())
    return BeginPush(pb.BeginPushRequest.FromString(_small(found[0])), found[1])


def _nearest(data: bytes) -> Nearest:
    outer = _without(memoryview(data), _VECTORS)
    inner = _without(outer[1][0], _PAYLOAD) if outer and len(outer[1]) == 1 else None
    if outer is None or inner is None or len(inner[1]) > 1:
        message = pb.NearestRequest.FromString(_small(data))
        return Nearest(message, memoryview(message.vectors.payload))
    message = pb.NearestRequest.FromString(_small(outer[0]))
    vectors = pb.Vectors.FromString(_small(inner[0]))
    if message.WhichOneof("query") == "vectors":  # classes may have come behind them
        message.vectors.CopyFrom(vectors)
    return Nearest(message, inner[1][0] if inner[1] else memoryview(b""))


def _without(data: memoryview, number: int) -> tuple[bytes, list[memoryview]] | None:
    """The message with every occurrence of one length-delimited field emptied, and what those held.

    None: protobuf has to say what this is.
    """
    rest: list[bytes | memoryview] = []
    found: list[memoryview] = []
    at = 0
    for _ in range(_MOST_FIELDS):
        if at == len(data):
            return b"".join(rest), found
        tag, behind = bulk.read_varint(data, at)
        start, stop = _extent(data, tag & 7, behind) if behind > 0 else (0, -1)
        if not 0 <= stop <= len(data):
            return None
        if tag == number << 3 | _LENGTH:
            rest += [data[at:behind], b"\0"]
            found.append(data[start:stop])
        else:
            rest.append(_small(data[at:stop]))
        at = stop
    return None


def _extent(data: memoryview, wire_type: int, at: int) -> tuple[int, int]:
    """Where the value of a field lies; -1: nowhere."""
    if wire_type == _LENGTH:
        length, at = bulk.read_varint(data, at)
        return at, at + length if at > 0 else -1
    if wire_type == _VARINT:
        return at, bulk.read_varint(data, at)[1]
    width = {_FIXED32: 4, _FIXED64: 8}.get(wire_type)
    return at, at + width if width else -1


def numbers(packed: memoryview) -> NDArray[np.int64]:
    """What protobuf packed as varints. InvalidArgumentError: it is damaged.

    Piece by piece, so that a flood of them needs no more memory than their numbers.
    """
    raw = np.frombuffer(packed, np.uint8)
    pieces, at = [np.empty(0, np.int64)], 0
    while at < len(raw):
        piece = raw[at : at + _PIECE_BYTES]
        ends = np.flatnonzero(piece < 0x80)
        starts = np.append(0, ends[:-1] + 1)
        if not len(ends) or (ends - starts).max() >= _MOST_VARINT:
            raise InvalidArgumentError("absent", "its bytes are not packed numbers")
        pieces.append(_varints(piece, starts, ends - starts + 1))
        at += int(ends[-1]) + 1
    return np.concatenate(pieces)


def _varints(
    raw: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    values = np.zeros(len(starts), np.uint64)
    for place in range(int(lengths.max())):
        there = slice(None) if place < lengths.min() else lengths > place
        bits = (raw[starts[there] + place] & 0x7F).astype(np.uint64)
        values[there] |= bits << np.uint64(7 * place)
    return values.view(np.int64)
