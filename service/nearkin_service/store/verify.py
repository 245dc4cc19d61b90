"""A data directory looked through from its first byte to its last, and left exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearkin_service.errors import DataLossError, NearkinError
from nearkin_service.store import generation_files as gens
from nearkin_service.store import journal, push_files
from nearkin_service.store.atomic import read_document
from nearkin_service.store.integrity import damage
from nearkin_service.store.journal import Kind
from nearkin_service.store.layout import ABOUT, FORMAT_VERSION
from nearkin_service.store.reserve import verified_reserve
from nearkin_service.values import EmbeddingsState, Generation, PushSpec

SOUND, NOTE, DAMAGED = "sound", "note", "damaged"


@dataclass(frozen=True, slots=True)
class Finding:
    """About one thing in the directory: `state` is sound, note (needs nobody) or damaged."""

    path: str
    state: str
    what: str


def verify(root: Path) -> Iterator[Finding]:
    """Findings, one for each generation and push, and for whatever else is wrong.

    The directory must not be served meanwhile. FileNotFoundError: there is none. ValueError: another format.
    """
    found = read_document(root / ABOUT).get("format")
    if found != FORMAT_VERSION:
        raise ValueError(f"{root} has format {found}; this version reads format {FORMAT_VERSION}")
    for run in sorted((root / "runs").iterdir()):
        yield from _run(root, run)
    for aside in sorted((root / "quarantine").glob("*")):
        yield _finding(root, aside, NOTE, "was damaged and is not served")


def _run(root: Path, run: Path) -> Iterator[Finding]:
    try:
        read_document(run / "run.json")
    except (OSError, NearkinError) as error:
        yield _finding(root, run / "run.json", DAMAGED, f"{error}; a start describes the run anew")
    for path in sorted((run / "generations").glob("*"), key=lambda path: (len(path.name), path.name)):
        if path.name.isdecimal():
            yield _finding(root, path, *_generation(path, run.name))
        else:
            yield _finding(root, path, NOTE, "was never published; a start removes it")
    for path in sorted((run / "pushes").glob("*")):
        yield _finding(root, path, *_push(path))


def _generation(path: Path, run: str) -> tuple[str, str]:
    try:
        generation = gens.read_tables(path, run, int(path.name))
        state = EmbeddingsState(read_document(path / gens.EMBEDDINGS)["state"])
        if state in (EmbeddingsState.KEPT, EmbeddingsState.FLUSHING):
            _require_rows(path, generation)
    except Exception as error:  # a finding, whatever it is
        return DAMAGED, str(error)
    if state is EmbeddingsState.LOST:
        return DAMAGED, "the table is sound; the embeddings were lost before"
    if state is not EmbeddingsState.DROPPED:
        try:
            verified_reserve(path, generation)
        except FileNotFoundError:
            pass  # as after a snapshot, which does not carry it
        except (DataLossError, OSError) as error:
            return NOTE, f"{error}; updates from this generation take longer, nothing else does"
    return SOUND, f"epoch {generation.epoch}, {generation.spec.num_classes} classes, embeddings {state}"


def _require_rows(path: Path, generation: Generation) -> None:
    """DataLossError: the embeddings are not what arrived."""
    wrong = damage(path / push_files.ROWS, path / push_files.JOURNAL, generation.spec)
    if wrong is not None:
        raise DataLossError(f"the table is sound; embeddings are damaged: {wrong}")


def _push(path: Path) -> tuple[str, str]:
    try:
        spec = PushSpec.from_document(read_document(path / push_files.PUSH)["spec"])
        if (path / push_files.OUTCOME).exists():
            outcome: dict[str, Any] = read_document(path / push_files.OUTCOME)
            return SOUND, f"epoch {spec.epoch}, {outcome['state']}"
        records, sound_bytes = journal.read(path / push_files.JOURNAL)
        torn = (path / push_files.JOURNAL).stat().st_size - sound_bytes
    except FileNotFoundError:
        return NOTE, "was not begun in full; a start removes it"
    except Exception as error:  # a finding, whatever it is
        return DAMAGED, str(error)
    stored = len(journal.row_set(records, Kind.ROWS))
    what = f"epoch {spec.epoch}, {stored} of {spec.num_classes} rows"
    return (NOTE, f"{what}; {torn} torn bytes of its journal are dropped") if torn else (SOUND, what)


def _finding(root: Path, path: Path, state: str, what: str) -> Finding:
    return Finding(str(path.relative_to(root)), state, what)
