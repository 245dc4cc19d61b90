"""The files of one push: `push.json` (what it is of), `rows.bin`, `journal`; `outcome.json` once it failed.

Methods run on I/O threads, several at once; the caller sees to it that no two of them write the same rows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from nearkin_service import faults
from nearkin_service.errors import AlreadyExistsError, DataLossError, lacking
from nearkin_service.ranges import RowRange, RowSet
from nearkin_service.store import journal
from nearkin_service.store.atomic import (
    fsync_directory,
    fsync_file,
    put_document,
    read_document,
    require_plain_files,
    write_document,
)
from nearkin_service.store.fitting import require_fit, require_moment
from nearkin_service.store.integrity import damage
from nearkin_service.store.journal import Kind, Record
from nearkin_service.store.layout import boot_id
from nearkin_service.store.rows import (
    Examined,
    Examiner,
    RowsFile,
    as_bytes,
    as_rows,
    begins_at,
    examine,
    refuse_infinite,
    rows_at_a_time,
)
from nearkin_service.store.spares import Spares
from nearkin_service.values import Ending, PushSpec, PushState, RecoveredPush

ROWS, JOURNAL, PUSH, OUTCOME = "rows.bin", "journal", "push.json", "outcome.json"


class PushFiles:
    """An open push on disk."""

    def __init__(self, directory: Path, spec: PushSpec) -> None:
        self.directory = directory
        self._spec = spec
        self.rows = RowsFile(directory / ROWS, spec, writable=True)
        self._journal = os.open(directory / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    @property
    def _open_journal(self) -> Path:
        """To be read whatever became of its name: published, it has another; aborted, none."""
        return Path(f"/proc/self/fd/{self._journal}")

    @staticmethod
    def create(
        directory: Path,
        push_id: str,
        spec: PushSpec,
        created: float,
        *,
        spares: Spares | None = None,
        rows_at: int = 0,
    ) -> PushFiles:
        """Makes the files, row 0 at byte `rows_at`; the push exists once its `push.json` does.

        A machine that dies before `settle` may forget it.
        """
        try:
            directory.mkdir(parents=True)
            if spares is None or not spares.take(rows_at + spec.rows_bytes, directory / ROWS):
                with (directory / ROWS).open("wb") as rows:
                    rows.truncate(rows_at + spec.rows_bytes)
            (directory / JOURNAL).touch()
            faults.point("push.rows_made")
            body = {"push_id": push_id, "spec": spec.to_document(), "created": created, "boot": boot_id()}
            put_document(directory / PUSH, body)
            faults.point("push.described")
            return PushFiles(directory, spec)
        except OSError as error:
            shutil.rmtree(directory, ignore_errors=True)  # its rows may be a spare's, which take room
            raise lacking(error) or error from error

    def receive(
        self, rows: RowRange, known: RowSet, absent: RowSet, payload: memoryview, crc: int | None
    ) -> RowSet:
        """Checks a message's rows, compares those that are known, stores the others; all of it or nothing.

        Args:
            rows: which they are.
            known: those of them that are stored already.
            absent: classes declared absent so far.
            payload: their bytes.
            crc: what the sender says of them.

        Returns:
            The rows that hold nothing but zeros.
        """
        rows_nR = as_rows(payload, self._spec)
        found = examine(rows_nR, self._spec.dtype)
        found.require(crc, rows.start)
        blank = refuse_infinite(found.infinite, rows.start, absent)
        if len(blank):
            rows_nR = rows_nR.copy()
            rows_nR[blank] = 0
        self.compare(rows_nR, rows.start, known, absent)
        zeros = RowSet.from_ids(found.zeros + rows.start)
        self._store(rows_nR, rows, known, zeros, found.crc if not len(known) and not len(blank) else None)
        return zeros

    def receive_as_they_come(
        self,
        rows: RowRange,
        fill: Callable[[memoryview], None],
        room: Callable[[int, int], memoryview],
        ending: Ending,
        absent: RowSet,
    ) -> RowSet:
        """The same for rows of which none is known, and which `fill` receives.

        That is into a `room` for so many bytes, which is aligned like their place in the file. They are
        written before all are here: what comes to nothing is never noted, and so is not there.
        """
        examiner, row_bytes = Examiner(self._spec.dtype), self._spec.row_bytes
        step = rows_at_a_time(row_bytes)
        for start in range(rows.start, rows.stop, step):
            piece = room(min(step, rows.stop - start) * row_bytes, self.rows.offset(start))
            fill(piece)
            if ending.looked:
                examiner.add_up(piece)
            else:
                examiner.look(as_rows(piece, self._spec))
            self.rows.put(start, piece)
        crc, sound = ending.said()
        if ending.looked and not sound:
            return self._take(rows, self.rows.examine(rows.start, len(rows)), crc, RowSet.empty(), absent)
        return self._take(rows, examiner.found(), crc, RowSet.empty(), absent)

    def receive_in_place(self, rows: RowRange, crc: int, known: RowSet, absent: RowSet) -> RowSet:
        """The same for rows that their sender wrote where they belong. Known ones are not noted again."""
        return self._take(rows, self.rows.examine(rows.start, len(rows)), crc, known, absent)

    def _take(
        self, rows: RowRange, found: Examined, crc: int | None, known: RowSet, absent: RowSet
    ) -> RowSet:
        """Notes rows that lie in their place, and in which this was `found`."""
        found.require(crc, rows.start)
        blank = refuse_infinite(found.infinite, rows.start, absent)
        for row in blank.tolist():
            self.rows.blank(rows.start + row, 1)
        zeros = RowSet.from_ids(found.zeros + rows.start)
        if len(known) or len(blank):
            fresh = known.complement(rows.start, rows.stop)
            records = [
                Record(Kind.ROWS, each.start, len(each), self.rows.checksum(each.start, len(each)))
                for each in fresh
            ]
        else:
            records = [Record(Kind.ROWS, rows.start, len(rows), found.crc)]
        self._note_stored(records, zeros)
        return zeros

    def take_in_place(self, rows: RowRange, crc: int) -> RowSet:
        """The same without a look at them, which `require_undamaged` is left to take."""
        zeros = RowSet.empty()
        self._note_stored([Record(Kind.ROWS, rows.start, len(rows), crc)], zeros)
        return zeros

    def compare(self, rows_nR: NDArray[Any], start: int, known: RowSet, absent: RowSet) -> None:
        """AlreadyExistsError: a known row came with other bytes. DataLossError: it is no longer what came."""
        try:
            compare_rows(self.rows, rows_nR, start, known, absent)
        except AlreadyExistsError as differs:
            damaged = self._damaged(start, start + len(rows_nR))
            if damaged is None:
                raise
            raise DataLossError(
                f"rows {damaged.start}..{damaged.stop - 1} were damaged in the data directory since they "
                "came: abort the push, and push the epoch again"
            ) from differs

    def _damaged(self, start: int, stop: int) -> RowRange | None:
        """The first rows that came together, some of them among these, and are not what came."""
        for record in journal.read(self._open_journal)[0]:
            rows = RowRange(record.start, record.start + record.count)
            among = record.kind is Kind.ROWS and rows.overlaps(RowRange(start, stop))
            if among and not self.rows.matches(record):
                return rows
        return None

    def _store(
        self, rows_nR: NDArray[Any], rows: RowRange, known: RowSet, zeros: RowSet, crc: int | None
    ) -> None:
        """`crc`: that of all rows, if they are stored as they came."""
        records = [
            self.rows.write(r.start, as_bytes(rows_nR[r.start - rows.start : r.stop - rows.start]), crc)
            for r in known.complement(rows.start, rows.stop)
        ]
        self._note_stored(records, zeros)

    def _note_stored(self, records: list[Record], zeros: RowSet) -> None:
        """One message's rows, which are in their place."""
        faults.point("write.rows_written")
        self.note(records + journal.records_of(Kind.ZERO, zeros))
        faults.point("write.noted")

    def note(self, records: list[Record]) -> None:
        """Adds to the journal."""
        self._append(b"".join(record.packed() for record in records))

    def _append(self, packed: bytes) -> None:
        try:
            if packed:
                journal.append_packed(self._journal, packed)
        except OSError as error:
            raise lacking(error) or error from error

    def note_absent(self, absent: RowSet) -> None:
        self._append(journal.packed(Kind.ABSENT, absent))
        faults.point("write.absent_noted")

    def note_commit_when_complete(self) -> None:
        self.note([Record(Kind.AUTOCOMMIT)])

    def note_vouched(self, rows: RowRange) -> None:
        self.note([Record(Kind.AUTOCOMMIT, rows.start, len(rows))])

    def note_committed(self) -> None:
        self.note([Record(Kind.COMMITTED)])
        faults.point("commit.noted")

    def settle(self) -> None:
        """Waits until the disk has all but the rows, so that a machine that dies finds the push again."""
        with suppress(FileNotFoundError):  # the push has ended
            for name in (PUSH, JOURNAL):
                fsync_file(self.directory / name)
            for directory in (self.directory, self.directory.parent):
                fsync_directory(directory)

    def compose(self, base: RowsFile, rows: RowSet) -> None:
        """Takes rows from another push's file, and notes them as if they had arrived."""
        for each in rows:
            for start, rows_nR in base.blocks(each.start, len(each)):
                self.note([self.rows.write(start, as_bytes(rows_nR))])

    def blank(self, rows: RowSet) -> None:
        """Zeroes rows that never came: an old row may lie there, or what a writer left who died."""
        for each in rows:
            self.rows.blank(each.start, len(each))

    def checksum(self, rows: RowRange) -> int:
        """CRC32C over these rows in order; what was never sent counts as zero bytes.

        That of the rows as they arrived; whether they still lie there like that is for the build to see.
        """

        def read_again(some: RowRange) -> int:
            return self.rows.checksum(some.start, len(some))

        return journal.checksum(self._open_journal, rows, self._spec.row_bytes, read_again)

    def require_undamaged(self, check: Callable[[], None]) -> None:
        """DataLossError: a stored row is not what arrived. `check` is called often, and may raise."""
        wrong = damage(self.directory / ROWS, self.directory / JOURNAL, self._spec, check)
        if wrong is not None:
            raise DataLossError(
                f"{wrong}: they were damaged in the data directory, or changed by their owner while they "
                "were pushed; push the epoch again"
            )

    def close(self) -> None:
        self.rows.close()
        os.close(self._journal)


def compare_rows(file: RowsFile, rows_nR: NDArray[Any], start: int, known: RowSet, absent: RowSet) -> None:
    """AlreadyExistsError: a row of `known` is stored with other bytes than here (from row `start`)."""
    for each in known:
        found = file.compare(each.start, rows_nR[each.start - start : each.stop - start], absent)
        if found is not None:
            raise AlreadyExistsError(
                f"row {found} is stored already with other bytes; an epoch's rows never change: abort the "
                "push, or push a later epoch"
            )


def finish(directory: Path, state: PushState, error: str, spares: Spares | None = None) -> None:
    """Records how a push ended that came to nothing, and frees its rows."""
    write_document(directory / OUTCOME, {"state": state, "error": error})
    faults.point("outcome.written")
    if spares is not None:
        spares.keep(directory / ROWS)
    _free_rows(directory)


def _free_rows(directory: Path) -> None:
    for name in (ROWS, JOURNAL):
        (directory / name).unlink(missing_ok=True)


def recover(directory: Path, run: str) -> RecoveredPush:
    """What is left of a push after a restart. DataLossError: its description is damaged.

    Rows that the machine, not just the process, may have lost are compared with their checksums.
    """
    require_plain_files(directory)
    about = read_document(directory / PUSH)
    spec = PushSpec.from_document(about["spec"])
    require_fit(spec, PushSpec, PUSH)
    require_moment(about["created"], f"{PUSH}.created")
    if (spec.run, about["push_id"]) != (run, directory.name):
        raise DataLossError(f"it says it is push {about['push_id']} of run {spec.run!r}")
    if (directory / OUTCOME).exists():
        return _recover_finished(directory, about, spec)
    records, sound_bytes = journal.read(directory / JOURNAL)
    if any(record.start + record.count > spec.num_classes for record in records):
        raise DataLossError("its journal speaks of rows that there are not")
    os.truncate(directory / JOURNAL, sound_bytes)
    if begins_at((directory / ROWS).stat().st_size, spec) is None:
        os.truncate(directory / ROWS, spec.rows_bytes)
    if about["boot"] != boot_id():
        records = _still_there(directory, spec, records)
    kinds = {record.kind for record in records}
    state = PushState.BUILDING if Kind.COMMITTED in kinds else PushState.OPEN
    vouched = journal.row_set([r for r in records if r.count], Kind.AUTOCOMMIT)
    return RecoveredPush(
        push_id=about["push_id"],
        spec=spec,
        created=about["created"],
        state=state,
        stored=journal.row_set(records, Kind.ROWS),
        zeros=journal.row_set(records, Kind.ZERO),
        absent=journal.row_set(records, Kind.ABSENT),
        vouched=vouched,
        commit_when_complete=any(r.kind is Kind.AUTOCOMMIT and not r.count for r in records),
    )


def _recover_finished(directory: Path, about: dict[str, Any], spec: PushSpec) -> RecoveredPush:
    outcome = read_document(directory / OUTCOME)
    require_fit(outcome["error"], str, f"{OUTCOME}.error")
    _free_rows(directory)
    return RecoveredPush(
        push_id=about["push_id"],
        spec=spec,
        created=about["created"],
        state=PushState(outcome["state"]),
        stored=RowSet.empty(),
        zeros=RowSet.empty(),
        absent=RowSet.empty(),
        vouched=RowSet.empty(),
        commit_when_complete=False,
        error=outcome["error"],
    )


def _still_there(directory: Path, spec: PushSpec, records: list[Record]) -> list[Record]:
    """The records but for rows whose bytes did not survive; a commit does not outlive a lost row."""
    rows = RowsFile(directory / ROWS, spec)
    try:
        kept = [r for r in records if r.kind is not Kind.ROWS or rows.matches(r)]
    finally:
        rows.close()
    if len(kept) < len(records):
        kept = [r for r in kept if r.kind is not Kind.COMMITTED]
    journal_path = directory / JOURNAL
    os.truncate(journal_path, 0)
    descriptor = os.open(journal_path, os.O_WRONLY | os.O_APPEND)
    try:
        journal.append(descriptor, kept)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    about = read_document(directory / PUSH)
    write_document(directory / PUSH, about | {"boot": boot_id()})
    return kept
