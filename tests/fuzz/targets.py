"""Functions of arbitrary bytes. Each returns whatever it is given; what it raises is a mistake of ours."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import crc32c
from google.protobuf.message import DecodeError
from nearkin.v1 import bulk, frames
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service.catalogue import Catalogue
from nearkin_service.errors import DataLossError, InvalidArgumentError, NearkinError
from nearkin_service.store import DataDirectory, journal, snapshots, verify
from nearkin_service.store.atomic import read_document
from nearkin_service.wire import convert, requests

FORMAT_1 = Path(__file__).parents[1] / "service" / "fixtures" / "format-1"
_FILES = sorted(path.relative_to(FORMAT_1) for path in FORMAT_1.rglob("*") if path.is_file())
_HOSTILE: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    1.5,
    1e308,
    "",
    "old",
    "../..",
    "\ud800",
    "kept",
    "lost",
    "float64",
    [],
    [0],
    [2**62, 2**62],
    {},
    {"a": {}},
)


def write_rows(data: bytes) -> None:
    """The codec of WriteRows says what the generated class says."""
    try:
        expected: pb.WriteRowsRequest | None = pb.WriteRowsRequest.FromString(data)
    except DecodeError:
        expected = None
    try:
        found = bulk.decode_write_rows(data)
    except DecodeError:
        assert expected is None, "refused, though protobuf takes it"
        return
    assert expected is not None, "taken, though protobuf refuses it"
    assert bytes(found.payload) == expected.payload
    assert (found.push_id, found.row_start, found.loan, found.sound) == (
        expected.push_id,
        expected.row_start,
        expected.loan,
        expected.sound,
    )
    assert found.shared_row_count == expected.shared_row_count
    assert found.crc32c == (expected.crc32c if expected.HasField("crc32c") else None)


def begin_push(data: bytes) -> None:
    """A BeginPush whose absent classes are read by ourselves is what protobuf says it is."""
    try:
        expected: pb.BeginPushRequest | None = pb.BeginPushRequest.FromString(data)
    except DecodeError:
        expected = None
    try:
        found = requests.reader(pb.BeginPushRequest)(data)
        absent = sorted(found.absent().tolist())
    except (DecodeError, InvalidArgumentError):
        assert expected is None, "refused, though protobuf takes it"
        return
    assert expected is not None, "taken, though protobuf refuses it"
    assert absent == sorted(expected.absent)
    del found.message.absent[:], expected.absent[:]
    assert found.message.SerializeToString() == expected.SerializeToString()


def nearest(data: bytes) -> None:
    """A query whose vectors stay where they arrived is what protobuf says it is."""
    try:
        expected: pb.NearestRequest | None = pb.NearestRequest.FromString(data)
    except DecodeError:
        expected = None
    try:
        found = requests.reader(pb.NearestRequest)(data)
    except DecodeError:
        assert expected is None, "refused, though protobuf takes it"
        return
    assert expected is not None, "taken, though protobuf refuses it"
    assert found.message.WhichOneof("query") == expected.WhichOneof("query")
    if expected.WhichOneof("query") == "vectors":
        assert bytes(found.payload) == expected.vectors.payload
        found.message.vectors.payload = expected.vectors.payload
    assert found.message.SerializeToString() == expected.SerializeToString()


def table_message(data: bytes) -> None:
    """The codec of ReadTable says what the generated class says."""
    try:
        expected = pb.ReadTableResponse.FromString(data)
        refused = expected.WhichOneof("content") is None
    except DecodeError:
        refused = True
    try:
        found = bulk.decode_table_message(data)
    except DecodeError:
        assert refused, "refused, though protobuf takes it"
        return
    assert not refused, "taken, though protobuf refuses it"
    if isinstance(found, pb.TableHeader):
        assert found == expected.header
        return
    block = expected.block
    assert bytes(found.payload) == block.payload
    assert (found.column, found.row_start, found.row_count, found.crc32c) == (
        block.column,
        block.row_start,
        block.row_count,
        block.crc32c,
    )


def lane_frames(data: bytes) -> None:
    """Messages on a socket are what was sent, and nothing but Malformed or Ended comes of anything else."""
    ours, theirs = socket.socketpair()
    taken = bytearray()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        with suppress(frames.Malformed, frames.Ended):
            while (message := frames.receive(ours, 1024)) is not None:
                assert len(message) <= 1024
                taken += bulk.varint(len(message)) + message
            assert len(taken) <= len(data), "all of it was read"
    shortest = len(taken) == len(data)
    assert not shortest or taken == data


def lane_block(data: bytes) -> None:
    """The head of a block that is taken is one that the generated class takes, with the same in it."""
    try:
        block, head = bulk.split_table_block(memoryview(data[: bulk.MOST_BLOCK_HEAD]), len(data))
    except DecodeError:
        return
    expected = pb.ReadTableResponse.FromString(data).block
    assert (block.column & 0x7F, block.row_start, block.row_count, block.crc32c) == (
        expected.column & 0x7F,
        expected.row_start,
        expected.row_count,
        expected.crc32c,
    )
    assert data[head:] == expected.payload


def lane_rows(data: bytes) -> None:
    """Rows whose head and tail are taken are what the generated class takes, with the same in it."""
    split = bulk.split_write_rows(memoryview(data[: bulk.MOST_WRITE_ROWS_HEAD]), len(data))
    if split is None:
        return
    found, head, nbytes = split
    crc, sound, tail = found.crc32c, found.sound, data[head + nbytes :]
    if tail:
        try:
            crc, said = bulk.split_write_rows_tail(tail)
        except DecodeError:
            return
        sound = said if len(tail) == bulk.WRITE_ROWS_TAIL_BYTES else sound
    expected = pb.WriteRowsRequest.FromString(data)
    assert data[head : head + nbytes] == expected.payload
    assert crc == (expected.crc32c if expected.HasField("crc32c") else None)
    assert (found.push_id, found.row_start, found.shared_row_count, found.loan, sound) == (
        expected.push_id,
        expected.row_start,
        expected.shared_row_count,
        expected.loan,
        expected.sound,
    )


def journal_file(data: bytes) -> None:
    """A journal is read up to its first damaged record. The first bit of a record's tag makes it sound."""
    with _file(_sound_records(data)) as path:
        records, size = journal.read(path)
        assert size == len(records) * journal.RECORD_BYTES <= path.stat().st_size
        for kind in journal.Kind:
            journal.row_set(records, kind)


def document(data: bytes) -> None:
    """A document is what was written, or DataLossError."""
    with _file(data) as path, suppress(DataLossError):
        assert isinstance(read_document(path), dict)


def data_directory(data: bytes) -> None:
    """A start never dies of what it finds; nor does `check`, nor whoever asks for the catalogue."""
    with _damaged(data) as root:
        with suppress(NearkinError, ValueError, FileNotFoundError):
            list(verify.verify(root))
        try:
            directory = DataDirectory(root)
        except ValueError:  # another format: said in one line
            return
        try:
            catalogue = Catalogue()
            catalogue.restore(directory.recover())
            for run in catalogue.runs.values():
                convert.run(run.view()).SerializeToString()
                for generation in run.generations.values():
                    convert.generation(generation).SerializeToString()
        finally:
            directory.close()


def snapshot(data: bytes) -> None:
    """A snapshot is restored or refused; nothing is written outside the data directory."""
    with tempfile.TemporaryDirectory() as folder:
        file, root = Path(folder) / "file.tar", Path(folder) / "root"
        with _damaged(data[8:]) as damaged, suppress(NearkinError, ValueError, OSError):
            snapshots.save(damaged, "old", file)
        if not file.exists():
            file.write_bytes(data)
        raw = bytearray(file.read_bytes())
        for at, value in zip(data[:8:2], data[1:8:2], strict=False):
            raw[at * 512 % len(raw) + value % 157 if raw else 0] ^= value
        file.write_bytes(raw)
        root.mkdir()
        with suppress(NearkinError, ValueError, OSError):
            snapshots.restore(root, file)
        assert {path.name for path in Path(folder).iterdir()} == {"file.tar", "root"}
        assert not list((root / "trash").glob("*"))


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    each.__name__: each
    for each in (
        write_rows,
        begin_push,
        nearest,
        table_message,
        lane_frames,
        lane_block,
        lane_rows,
        journal_file,
        document,
        data_directory,
        snapshot,
    )
}


# ---------------------------------------------------------------------------------------------- materials


@contextmanager
def _file(data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        yield path


def _sound_records(data: bytes) -> bytes:
    """Every other record gets the checksum that it should have."""
    made = bytearray()
    for at in range(0, len(data), 29):
        head = data[at + 1 : at + 29]
        made += head
        if len(head) == 28 and data[at] & 1:
            made += crc32c.crc32c(head).to_bytes(4, "little")
    return bytes(made)


@contextmanager
def _damaged(data: bytes) -> Iterator[Path]:
    """A data directory of format 1 in which these bytes have changed something, three bytes a change."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        shutil.copytree(FORMAT_1, root)
        for at in range(0, len(data) - 2, 3):
            path = root / _FILES[data[at] % len(_FILES)]
            if path.exists():
                _damage(path, data[at + 1], data[at + 2])
        yield root


def _damage(path: Path, how: int, value: int) -> None:
    """Documents keep a right checksum over wrong contents: what a mistake in another version would leave."""
    raw = path.read_bytes()
    if path.suffix == ".json" and how < 224:
        with suppress(ValueError, KeyError):
            body = json.loads(raw)["body"]
            _replace(body, how, value)
            canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
            path.write_text(json.dumps({"body": body, "crc32c": crc32c.crc32c(canonical)}))
    elif how % 3 == 0:
        path.write_bytes(raw[: value * len(raw) // 256])
    elif how % 3 == 1:
        path.write_bytes(raw + bytes([value]) * (how + 1))
    elif raw:
        changed = bytearray(raw)
        changed[value % len(raw)] ^= 1 << how % 8
        path.write_bytes(changed)


def _replace(body: Any, which: int, value: int) -> None:
    """One value in a document becomes a hostile one, or goes."""
    places = list(_places(body))
    if not places:  # everything went before
        return
    holder, key = places[which % len(places)]
    if value == 255:
        del holder[key]
    else:
        holder[key] = _HOSTILE[value % len(_HOSTILE)]


def _places(body: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(body) if isinstance(body, dict) else range(len(body)) if isinstance(body, list) else ()
    for key in keys:
        yield body, key
        yield from _places(body[key])
