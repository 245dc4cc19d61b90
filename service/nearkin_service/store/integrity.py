"""Whether a rows file still holds what arrived: its bytes against the checksums in its journal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nearkin_service.store import journal
from nearkin_service.store.journal import Kind
from nearkin_service.store.rows import RowsFile
from nearkin_service.values import PushSpec


def damage(
    rows: Path, journal_path: Path, spec: PushSpec, check: Callable[[], None] = lambda: None
) -> str | None:
    """What is wrong with the rows, or None. Reads every byte; `check` is called often, and may raise."""
    try:
        records, _ = journal.read(journal_path)
    except FileNotFoundError:
        return "the journal is missing"
    spoken_of = journal.row_set(records, Kind.ROWS).union(journal.row_set(records, Kind.ABSENT))
    if len(spoken_of) != spec.num_classes:
        return "the journal does not speak of every row"
    file = RowsFile(rows, spec)
    try:
        for record in records:
            check()
            if record.kind is Kind.ROWS and not file.matches(record):
                last = record.start + record.count - 1
                return f"rows {record.start}..{last} are not what arrived"
    finally:
        file.close()
    return None
