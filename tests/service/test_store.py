"""What lies on disk survives anything that can happen to bytes: it is read as written, or noticed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import crc32c
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nearkin_service.errors import AlreadyExistsError, DataLossError
from nearkin_service.ranges import RowRange, RowSet
from nearkin_service.store import DataDirectory, PushFiles, as_bytes, journal
from nearkin_service.store.atomic import read_document, write_document
from nearkin_service.store.journal import Kind, Record
from nearkin_service.store.push_files import recover
from nearkin_service.store.rows import examine
from nearkin_service.values import DTYPES, PushSpec

SPEC = PushSpec(run="run", epoch=0, num_classes=12, row_shape=(3,), dtype="float32", k=2)
in_place = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
records = st.builds(
    Record, st.sampled_from(Kind), st.integers(0, 2**30), st.integers(0, 2**20), st.integers(0, 2**32 - 1)
)


@in_place
@given(st.dictionaries(st.text(max_size=5), json_values, max_size=4), st.data())
def test_documents_are_whole_or_noticed(tmp_path: Path, body: dict[str, Any], data: st.DataObject) -> None:
    path = tmp_path / "document.json"
    write_document(path, body)
    assert read_document(path) == body
    damaged = bytearray(path.read_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    with contextlib.suppress(DataLossError):
        assert read_document(path) == body, "only white space may change unnoticed"


@in_place
@given(st.lists(records, max_size=6), st.binary(max_size=40), st.data())
def test_a_journal_is_read_up_to_its_first_damaged_record(
    tmp_path: Path, written: list[Record], tail: bytes, data: st.DataObject
) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b"")
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    journal.append(descriptor, written)
    os.write(descriptor, tail)
    os.close(descriptor)
    found, size = journal.read(path)
    assert found[: len(written)] == written
    assert size >= len(written) * journal.RECORD_BYTES
    if written:
        damaged = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(written) * journal.RECORD_BYTES - 1))
        damaged[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(damaged)
        found, _ = journal.read(path)
        assert found == written[: at // journal.RECORD_BYTES]


@given(st.data())
def test_odd_rows_are_found(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    count, size = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    limits: Any = ml_dtypes.finfo(DTYPES[dtype])  # type: ignore[no-untyped-call]
    odd = [
        0.0,
        -0.0,
        float("nan"),
        float("inf"),
        float("-inf"),
        float(limits.max),
        float(limits.smallest_subnormal),
    ]
    elements = st.lists(st.sampled_from([*odd, 1.0, -2.0]), min_size=count * size, max_size=count * size)
    rows = np.array(data.draw(elements)).astype(DTYPES[dtype]).reshape(count, size)
    found = examine(rows, dtype)
    exact = rows.astype(np.float64)
    assert found.infinite.tolist() == np.flatnonzero(~np.isfinite(exact).all(axis=1)).tolist()
    assert found.zeros.tolist() == np.flatnonzero((exact == 0).all(axis=1)).tolist()


@in_place
@given(st.data())
def test_any_sequence_of_writes_is_recovered(tmp_path: Path, data: st.DataObject) -> None:
    """Against a model: messages of any ranges, right or with other bytes; the files closed as if killed."""
    directory = tmp_path / os.urandom(12).hex()
    truth = np.arange(36, dtype=np.float32).reshape(12, 3)
    files = PushFiles.create(directory, directory.name, SPEC, 1.0, rows_at=data.draw(st.integers(0, 63)))
    stored: set[int] = set()
    for _ in range(data.draw(st.integers(0, 6))):
        start = data.draw(st.integers(0, 11))
        stop = data.draw(st.integers(start + 1, 12))
        rows = truth[start:stop].copy()
        wrong = data.draw(st.none() | st.integers(start, stop - 1))
        if wrong is not None:
            rows[wrong - start] += 1
        known = RowSet.from_ids(np.array(sorted(stored & set(range(start, stop))), np.int64))
        arrival = (RowRange(start, stop), known, RowSet.empty(), as_bytes(rows), None)
        if wrong is not None and wrong not in stored:
            continue  # would become the truth
        if wrong is not None:
            with pytest.raises(AlreadyExistsError, match=f"row {wrong} "):
                files.receive(*arrival)
            continue
        files.receive(*arrival)
        stored |= set(range(start, stop))
    files.close()
    found = recover(directory, "run")
    assert set(found.stored.ids().tolist()) == stored
    again = PushFiles(directory, SPEC)
    for row in stored:
        np.testing.assert_array_equal(again.rows.read(row, 1)[0], truth[row])
    again.close()


def test_a_directory_has_one_owner(tmp_path: Path) -> None:
    first = DataDirectory(tmp_path)
    with pytest.raises(ValueError, match="in use"):
        DataDirectory(tmp_path)
    first.close()
    DataDirectory(tmp_path).close()


def test_what_is_no_run_is_set_aside_or_left_alone(tmp_path: Path) -> None:
    (tmp_path / "runs" / "Not A Run").mkdir(parents=True)
    (tmp_path / "runs" / "Not A Run" / "file").touch()
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / "stray-file").touch()
    directory = DataDirectory(tmp_path)
    assert directory.recover() == []
    assert directory.quarantined == 1
    directory.close()


def test_the_checksum_of_all_rows_is_to_be_had_while_they_are_published(tmp_path: Path) -> None:
    """A commit may meet the publication of a push that closed by itself, which moves the journal."""
    rows = np.arange(1, 37, dtype=np.float32).reshape(12, 3)
    files = PushFiles.create(tmp_path / "push", "push", SPEC, 1.0)
    files.receive(RowRange(0, 12), RowSet.empty(), RowSet.empty(), as_bytes(rows), None)
    expected = files.checksum(RowRange(0, 12))
    (tmp_path / "push" / "journal").unlink()
    assert files.checksum(RowRange(0, 12)) == expected
    files.close()


@pytest.mark.parametrize("part", [(0, 12), (0, 4), (4, 9), (2, 11), (5, 6), (9, 12), (7, 7)])
def test_the_checksum_of_a_part_whatever_the_messages_were(tmp_path: Path, part: tuple[int, int]) -> None:
    """Messages may go beyond it, and rows that never came count as zeros."""
    rows = np.arange(1, 37, dtype=np.float32).reshape(12, 3)
    files = PushFiles.create(tmp_path / "push", "push", SPEC, 1.0)
    for start, stop in [(7, 9), (0, 4), (4, 7)]:
        piece = as_bytes(rows[start:stop])
        files.receive(RowRange(start, stop), RowSet.empty(), RowSet.empty(), piece, None)
    rows[9:] = 0
    assert files.checksum(RowRange(*part)) == crc32c.crc32c(rows[slice(*part)].tobytes())
    files.close()
