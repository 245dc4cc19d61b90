"""The two bulk messages, read and written without copying their payload through protobuf.

`WriteRowsRequest` and `ReadTableResponse.block` carry megabytes behind a few header bytes. What `encode_*` returns is
a plain protobuf message with its payload last; `decode_*` accepts *any* encoding of the message, takes the usual ones
apart by itself and leaves the payload where it lies, and hands the rest (unknown fields, merged sub-messages, damaged
bytes) to the generated classes. Works as gRPC (de)serialiser on either side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from nearkin.v1 import neighbours_pb2 as pb
from nearkin.v1.buffers import Buffer
from nearkin.v1.checksums import crc32c

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_INT64_SIGN = 1 << 63
_UINT64_MASK = (1 << 64) - 1

_PUSH_ID, _ROW_START, _SHARED_ROW_COUNT, _CRC32C, _LOAN, _SOUND, _PLACE, _PAYLOAD = 1, 2, 3, 4, 7, 8, 9, 15
_WRITE_ROWS_FIELDS = {
    _PUSH_ID: _LENGTH,
    _ROW_START: _VARINT,
    _SHARED_ROW_COUNT: _VARINT,
    _CRC32C: _FIXED32,
    _LOAN: _LENGTH,
    _SOUND: _VARINT,
    _PLACE: _FIXED32,
    _PAYLOAD: _LENGTH,
}

_BLOCK = 2
_COLUMN, _BLOCK_ROW_START, _BLOCK_ROW_COUNT, _BLOCK_CRC32C = 1, 2, 3, 4
_BLOCK_FIELDS = {
    _COLUMN: _VARINT,
    _BLOCK_ROW_START: _VARINT,
    _BLOCK_ROW_COUNT: _VARINT,
    _BLOCK_CRC32C: _FIXED32,
    _PAYLOAD: _LENGTH,
}


@dataclass(frozen=True, slots=True)
class WriteRows:
    """A `WriteRowsRequest` whose `payload` still lies in the received message.

    What is written has a `place_crc32c` of its own; what was read has the one that it came with.
    """

    push_id: str
    row_start: int
    payload: memoryview
    crc32c: int | None = None
    shared_row_count: int = 0
    loan: str = ""
    sound: bool = False
    place_crc32c: int | None = None

    @property
    def misplaced(self) -> bool:
        """Whether it does not say any more where its sender's rows belong."""
        return self.place_crc32c is not None and self.place_crc32c != self.place()

    def place(self) -> int:
        """The `place_crc32c` that is right."""
        row_start, count = self.row_start & _UINT64_MASK, self.shared_row_count & _UINT64_MASK
        return crc32c(self.push_id.encode() + row_start.to_bytes(8, "little") + count.to_bytes(8, "little"))


@dataclass(frozen=True, slots=True)
class TableBlock:
    """A `TableBlock` whose `payload` still lies in the received message. `column` is a `pb.TableColumn` value."""

    column: int
    row_start: int
    row_count: int
    crc32c: int
    payload: memoryview


def encode_write_rows(message: WriteRows) -> bytes:
    """The message as protobuf bytes, the payload last; one copy."""
    payload = message.payload.cast("B") if message.payload.nbytes else b""
    return b"".join((write_rows_head(message), payload))


def write_rows_head(message: WriteRows) -> bytes:
    """The message as protobuf bytes up to its payload, which has to follow; one without crc32c may have a tail.

    Its place_crc32c comes first: no damaged length in front of it can swallow it together with what it protects.
    """
    head = pb.WriteRowsRequest(
        push_id=message.push_id,
        row_start=message.row_start,
        shared_row_count=message.shared_row_count,
        loan=message.loan,
        sound=message.sound,
    )
    if message.crc32c is not None:
        head.crc32c = message.crc32c
    place = _fixed32(_PLACE, message.place())
    return place + head.SerializeToString() + _length_prefix(_PAYLOAD, message.payload.nbytes)


def _fixed32(number: int, value: int) -> bytes:
    return bytes([number << 3 | _FIXED32]) + value.to_bytes(4, "little")


def write_rows_tail(crc: int, *, sound: bool) -> bytes:
    """What is known of a message once its payload has been sent."""
    return _fixed32(_CRC32C, crc) + bytes([_SOUND << 3 | _VARINT, sound])


WRITE_ROWS_TAIL_BYTES = len(write_rows_tail(0, sound=False))
_SOUND_FIELD = {b"": False} | {bytes([_SOUND << 3 | _VARINT, sound]): sound for sound in (False, True)}
_CRC_BYTES = 5  # a tail may end there: its sender has not looked at the rows


def split_write_rows_tail(tail: Buffer) -> tuple[int, bool]:
    """What `write_rows_tail` was given: crc32c and whether all is sound. DecodeError: it is something else."""
    data = bytes(tail)
    crc, sound = int.from_bytes(data[1:_CRC_BYTES], "little"), data[_CRC_BYTES:]
    if data[0] != _CRC32C << 3 | _FIXED32 or sound not in _SOUND_FIELD:
        raise DecodeError("what follows the payload is no crc32c, or more than that and `sound`")
    return crc, _SOUND_FIELD[sound]


MOST_WRITE_ROWS_HEAD = 256
"""`write_rows_head` is shorter."""


def split_write_rows(start: memoryview, length: int) -> tuple[WriteRows, int, int] | None:
    """What `write_rows_head` wrote, how many bytes of it there are, and how many of payload follow.

    Behind them there is nothing, or a tail. `start`: the first bytes of a message of so many bytes in all. None: it
    is another encoding, or none.
    """
    fields: dict[int, int | memoryview] = {}
    position = 0
    while True:
        tag, position = read_varint(start, position)
        number = tag >> 3
        if position < 0 or _WRITE_ROWS_FIELDS.get(number) != tag & 7 or number in fields:
            return None
        if number == _PAYLOAD:
            break
        value, position = _value(start, position, tag & 7)
        if not 0 <= position <= len(start):
            return None
        fields[number] = value
    nbytes, position = read_varint(start, position)
    tail_bytes = 0 if _CRC32C in fields else length - position - nbytes
    if position < 0 or not nbytes or tail_bytes not in (0, _CRC_BYTES, WRITE_ROWS_TAIL_BYTES):
        return None
    message = _write_rows(fields, memoryview(b""))
    if message is None or position + nbytes + tail_bytes != length:
        return None
    return message, position, nbytes


def decode_write_rows(data: Buffer) -> WriteRows:
    """Takes a serialised `WriteRowsRequest` apart. DecodeError: these bytes are not one."""
    fields = _scan(memoryview(data), _WRITE_ROWS_FIELDS)
    message = None if fields is None else _write_rows(fields, _bytes(fields.get(_PAYLOAD)))
    if message is not None:
        return message
    parsed = pb.WriteRowsRequest.FromString(bytes(data))
    return WriteRows(
        push_id=parsed.push_id,
        row_start=parsed.row_start,
        shared_row_count=parsed.shared_row_count,
        crc32c=parsed.crc32c if parsed.HasField("crc32c") else None,
        loan=parsed.loan,
        sound=parsed.sound,
        place_crc32c=parsed.place_crc32c if parsed.HasField("place_crc32c") else None,
        payload=memoryview(parsed.payload),
    )


def _write_rows(fields: Mapping[int, int | memoryview], payload: memoryview) -> WriteRows | None:
    """None: a text is none; the generated parser is to say so."""
    push_id, loan = _text(fields.get(_PUSH_ID)), _text(fields.get(_LOAN))
    if push_id is None or loan is None:
        return None
    return WriteRows(
        push_id=push_id,
        row_start=_signed(fields.get(_ROW_START)),
        shared_row_count=_signed(fields.get(_SHARED_ROW_COUNT)),
        crc32c=_integer(fields[_CRC32C]) if _CRC32C in fields else None,
        loan=loan,
        sound=bool(_integer(fields.get(_SOUND, 0))),
        place_crc32c=_integer(fields[_PLACE]) if _PLACE in fields else None,
        payload=payload,
    )


def encode_table_message(message: TableBlock | pb.TableHeader) -> bytes:
    """A `ReadTableResponse` with this content, the payload of a block last; one copy."""
    if isinstance(message, pb.TableHeader):
        return pb.ReadTableResponse(header=message).SerializeToString()
    payload = message.payload.cast("B") if message.payload.nbytes else b""
    return b"".join((table_block_head(message, len(payload)), payload))


def table_block_head(message: TableBlock, payload_bytes: int) -> bytes:
    """A `ReadTableResponse` (or a `BulkReply`) with this block up to its payload, which has to follow."""
    head = pb.TableBlock(
        column=message.column,  # type: ignore[arg-type]
        row_start=message.row_start,
        row_count=message.row_count,
        crc32c=message.crc32c,
    ).SerializeToString() + _length_prefix(_PAYLOAD, payload_bytes)
    return _length_prefix(_BLOCK, len(head) + payload_bytes) + head


MOST_BLOCK_HEAD = 64
"""`table_block_head` is shorter."""


def split_table_block(start: memoryview, length: int) -> tuple[TableBlock, int]:
    """What `table_block_head` wrote, and how many bytes of it there are; the payload is what lies behind.

    `start`: the first bytes of a message of so many bytes in all. DecodeError: it is no such message.
    """
    tag, position = read_varint(start, 0)
    inner, position = read_varint(start, position) if position > 0 else (0, -1)
    if position < 0 or tag != _BLOCK << 3 | _LENGTH or position + inner != length:
        raise DecodeError("not a block of a table")
    fields: dict[int, int] = {}
    while True:
        tag, position = read_varint(start, position)
        number = tag >> 3
        if position < 0 or _BLOCK_FIELDS.get(number) != tag & 7 or number in fields:
            raise DecodeError("not the head of a table's block")
        if number == _PAYLOAD:
            break
        value, position = _value(start, position, tag & 7)
        if position < 0:
            raise DecodeError("not the head of a table's block")
        fields[number] = _integer(value)
    nbytes, position = read_varint(start, position)
    if position < 0 or position + nbytes != length:
        raise DecodeError("the payload of a table's block does not end where the block does")
    column, first, count = (fields.get(each, 0) for each in (_COLUMN, _BLOCK_ROW_START, _BLOCK_ROW_COUNT))
    block = TableBlock(column, _signed(first), _signed(count), fields.get(_BLOCK_CRC32C, 0), memoryview(b""))
    return block, position


def decode_table_message(data: bytes) -> TableBlock | pb.TableHeader:
    """Takes a serialised `ReadTableResponse` apart. DecodeError: these bytes are not one, or hold neither content."""
    outer = _scan(memoryview(data), {_BLOCK: _LENGTH})
    block = None if outer is None or _BLOCK not in outer else _scan(_bytes(outer[_BLOCK]), _BLOCK_FIELDS)
    if block is None or _integer(block.get(_COLUMN, 0)) > 0x7F:
        return _parse_table_message(data)
    return TableBlock(
        column=_integer(block.get(_COLUMN, 0)),
        row_start=_signed(block.get(_BLOCK_ROW_START)),
        row_count=_signed(block.get(_BLOCK_ROW_COUNT)),
        crc32c=_integer(block.get(_BLOCK_CRC32C, 0)),
        payload=_bytes(block.get(_PAYLOAD)),
    )


def _parse_table_message(data: bytes) -> TableBlock | pb.TableHeader:
    parsed = pb.ReadTableResponse.FromString(data)
    if parsed.WhichOneof("content") == "header":
        return parsed.header
    if parsed.WhichOneof("content") is None:
        raise DecodeError("a ReadTableResponse holds neither a header nor a block")
    block = parsed.block
    return TableBlock(block.column, block.row_start, block.row_count, block.crc32c, memoryview(block.payload))


def _scan(data: memoryview, known: Mapping[int, int]) -> dict[int, int | memoryview] | None:
    """Field values by number; None for whatever the generated parser should look at instead: repeated fields, too."""
    fields: dict[int, int | memoryview] = {}
    position, end = 0, len(data)
    while position < end:
        tag, position = read_varint(data, position)
        number = tag >> 3
        if position < 0 or known.get(number) != tag & 7 or number in fields:
            return None
        value, position = _value(data, position, tag & 7)
        if position < 0 or position > end:
            return None
        fields[number] = value
    return fields


def _value(data: memoryview, position: int, wire_type: int) -> tuple[int | memoryview, int]:
    if wire_type == _FIXED32:
        return int.from_bytes(data[position : position + 4], "little"), position + 4
    value, position = read_varint(data, position)
    if wire_type == _VARINT or position < 0:
        return value, position
    return data[position : position + value], position + value


def read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """A varint of at most ten bytes and the position behind it; position -1 where there is none."""
    value = 0
    for shift, byte in enumerate(data[position : position + 10]):
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value & _UINT64_MASK, position + shift + 1
    return 0, -1


def _length_prefix(number: int, length: int) -> bytes:
    return bytes([number << 3 | _LENGTH]) + varint(length)


def varint(value: int) -> bytes:
    """Of a number that is not negative."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _text(value: int | memoryview | None) -> str | None:
    try:
        return "" if value is None else str(_bytes(value), "utf-8")
    except UnicodeDecodeError:
        return None


def _signed(value: int | memoryview | None) -> int:
    number = 0 if value is None else _integer(value)
    return number - (1 << 64) if number & _INT64_SIGN else number


def _integer(value: int | memoryview) -> int:
    assert isinstance(value, int)
    return value


def _bytes(value: int | memoryview | None) -> memoryview:
    if value is None:
        return memoryview(b"")
    assert isinstance(value, memoryview)
    return value
