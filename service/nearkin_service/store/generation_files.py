"""The files of one generation.

`manifest.json`, `ids.bin`, `scores.bin`, `absent.bin`; and the embeddings: `rows.bin`, its `journal` (the
checksums) and `embeddings.json` (whether they are safe, dropped or lost), with `reserve.bin` beside them.

A generation is written aside, flushed, and put in its place by one rename: it is there whole, or not at
all.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from nearkin.v1.checksums import crc32c
from numpy.typing import NDArray

from nearkin_service import faults
from nearkin_service.engines.contract import BuiltTable, MeasuredRecall
from nearkin_service.errors import DataLossError, FailedPreconditionError, NotFoundError, is_momentary
from nearkin_service.store.atomic import (
    change_document,
    fsync_directory,
    fsync_file,
    read_document,
    require_plain_files,
    write_document,
)
from nearkin_service.store.fitting import require_fit, require_moment
from nearkin_service.store.integrity import damage
from nearkin_service.store.layout import FORMAT_VERSION, boot_id
from nearkin_service.store.push_files import JOURNAL, ROWS
from nearkin_service.store.reserve import RESERVE, write_reserve
from nearkin_service.store.rows import RowsFile, as_bytes, begins_at, mapped
from nearkin_service.store.spares import Spares
from nearkin_service.values import EmbeddingsState, FileChecksums, Generation, PushSpec, ReserveFile

log = logging.getLogger("nearkin.store")

MANIFEST, IDS, SCORES, ABSENT, EMBEDDINGS = (
    "manifest.json",
    "ids.bin",
    "scores.bin",
    "absent.bin",
    "embeddings.json",
)
PINNED = "pinned"
_APART = ("embeddings", "reserve")  # in the manifest
_BLOCK_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Finished:
    """A build's result with all that a manifest says of it."""

    number: int
    spec: PushSpec
    push_id: str
    absent: NDArray[np.int64]
    table: BuiltTable
    build_seconds: float
    published: float


def publish(generations: Path, finished: Finished, push_directory: Path) -> Generation:
    """Puts a generation in its place; all but the embeddings' last bytes is on disk when this returns."""
    aside = generations / f".aside-{secrets.token_hex(8)}"
    aside.mkdir(parents=True)
    placed: Path | None = None
    try:
        generation = _write_tables(aside, finished)
        faults.point("publish.tables_written")
        for name in (ROWS, JOURNAL):
            os.link(push_directory / name, aside / name)
        faults.point("publish.rows_linked")
        fsync_file(aside / JOURNAL)
        _write_embeddings_state(aside, EmbeddingsState.FLUSHING)
        write_document(aside / MANIFEST, _to_manifest(generation))
        faults.point("publish.described")
        placed = aside.rename(generations / str(finished.number))
        faults.point("publish.renamed")
        fsync_directory(generations)
    except BaseException:
        if placed is not None:  # nobody has seen it, and its number is to be had again
            placed.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return generation


def _write_tables(directory: Path, finished: Finished) -> Generation:
    table = finished.table
    absent = np.ascontiguousarray(finished.absent, "<i8")
    _write_durably(directory / ABSENT, absent)
    return Generation(
        number=finished.number,
        spec=finished.spec,
        push_id=finished.push_id,
        engine=table.engine,
        device=table.device,
        exact=table.exact,
        recomputed_rows=table.recomputed_rows,
        absent_count=len(finished.absent),
        published=finished.published,
        build_seconds=finished.build_seconds,
        stage_seconds=dict(table.stage_seconds),
        versions=dict(table.versions),
        recall=table.recall,
        ids=_write_column(directory / IDS, np.ascontiguousarray(table.ids, "<i4")),
        scores=_write_column(directory / SCORES, np.ascontiguousarray(table.scores, "<f4")),
        absent_crc32c=crc32c(as_bytes(absent)),
        reserve=write_reserve(directory, table.reserve),
    )


def _write_column(path: Path, column_Nk: NDArray[Any]) -> FileChecksums:
    _write_durably(path, column_Nk)
    return _checksums(column_Nk)


def _write_durably(path: Path, array: NDArray[Any]) -> None:
    with path.open("wb") as file:
        if array.size:
            file.write(as_bytes(array))
        file.flush()
        os.fsync(file.fileno())


def _checksums(column_Nk: NDArray[Any]) -> FileChecksums:
    block_rows = max(1, _BLOCK_BYTES // column_Nk.strides[0])
    blocks: list[int] = []
    whole = 0
    for at in range(0, len(column_Nk), block_rows):
        data = as_bytes(column_Nk[at : at + block_rows])
        blocks.append(crc32c(data))
        whole = crc32c(data, whole)
    return FileChecksums(block_rows, whole, tuple(blocks))


def _to_manifest(generation: Generation) -> dict[str, Any]:
    body = {f.name: getattr(generation, f.name) for f in fields(generation) if f.name not in _APART}
    body["spec"] = generation.spec.to_document()
    for name in ("ids", "scores", "recall"):
        body[name] = asdict(body[name]) if body[name] is not None else None
    body["ids"]["blocks"] = list(generation.ids.blocks)
    body["scores"]["blocks"] = list(generation.scores.blocks)
    manifest: dict[str, Any] = {"format": FORMAT_VERSION, "generation": body}
    if generation.reserve is not None:  # apart: versions that do not know it refuse what they do not know
        manifest["reserve"] = asdict(generation.reserve)
    return manifest


def _from_manifest(body: Mapping[str, Any]) -> Generation:
    try:
        found = dict(body["generation"])
        found["spec"] = PushSpec.from_document(found["spec"])
        for name in ("ids", "scores"):
            found[name] = FileChecksums(**found[name] | {"blocks": tuple(found[name]["blocks"])})
        found["recall"] = None if found["recall"] is None else MeasuredRecall(**found["recall"])
        if "reserve" in body:
            found["reserve"] = ReserveFile(**body["reserve"])
        generation = Generation(**found)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataLossError(f"{MANIFEST} cannot be read: {str(error)[:200]}") from error
    require_fit(generation, Generation, MANIFEST)
    require_moment(generation.published, f"{MANIFEST}.published")
    return generation


def load(directory: Path, run: str, number: int) -> Generation:
    """Reads a generation back and verifies its tables. DataLossError: something is damaged or missing."""
    generation = read_tables(directory, run, number)
    with _damage(directory):
        return replace(
            generation,
            embeddings=_recover_embeddings(directory, generation),
            pinned=(directory / PINNED).exists(),
        )


def read_tables(directory: Path, run: str, number: int) -> Generation:
    """What a generation says of itself, its table verified; the state of its embeddings is not looked up.

    DataLossError: something is damaged or missing.
    """
    with _damage(directory):
        require_plain_files(directory)
        generation = _from_manifest(read_document(directory / MANIFEST))
        if (generation.run, generation.number) != (run, number):
            raise DataLossError(f"it says it is generation {generation.number} of run {generation.run!r}")
        for name, expected in ((IDS, generation.ids), (SCORES, generation.scores)):
            _verify_column(directory / name, generation, expected)
        read_absent(directory, generation)
    return generation


@contextmanager
def _damage(directory: Path) -> Iterator[None]:
    """A file that cannot be read is one that is damaged, unless it is us who cannot."""
    try:
        yield
    except OSError as error:
        if is_momentary(error):
            raise
        raise DataLossError(
            f"{directory.name}: {error.strerror}: {Path(str(error.filename)).name}"
        ) from error


def verified_table(directory: Path, generation: Generation) -> tuple[NDArray[Any], NDArray[Any]]:
    """Ids and scores, mapped read-only. DataLossError: they are not what was published, or are gone."""
    with _damage(directory):
        for name, expected in ((IDS, generation.ids), (SCORES, generation.scores)):
            _verify_column(directory / name, generation, expected)
        return map_column(directory, generation, IDS), map_column(directory, generation, SCORES)


def _verify_column(path: Path, generation: Generation, expected: FileChecksums) -> None:
    spec = generation.spec
    if path.stat().st_size != spec.num_classes * spec.k * 4:
        raise DataLossError(
            f"{path.name} has {path.stat().st_size} bytes, not {spec.num_classes * spec.k * 4}"
        )
    if _checksums(np.memmap(path, "<i4", mode="r", shape=(spec.num_classes, spec.k))) != expected:
        raise DataLossError(f"{path.name} does not match its checksum")


def read_absent(directory: Path, generation: Generation) -> NDArray[np.int64]:
    """Ids of the classes that had no embedding, ascending."""
    absent: NDArray[np.int64] = np.fromfile(directory / ABSENT, "<i8")
    if crc32c(as_bytes(absent)) != generation.absent_crc32c:
        raise DataLossError(f"{ABSENT} does not match its checksum")
    return absent


def _recover_embeddings(directory: Path, generation: Generation) -> EmbeddingsState:
    about = _read_embeddings_state(directory)
    state = EmbeddingsState(about["state"])
    if state in (EmbeddingsState.DROPPED, EmbeddingsState.LOST):
        return state
    rows = directory / ROWS
    if not rows.exists() or begins_at(rows.stat().st_size, generation.spec) is None:
        return lose(directory, generation, "rows.bin is missing or short")
    if state is EmbeddingsState.FLUSHING and about["boot"] != boot_id():
        return verify_rows(directory, generation)
    return state


def _read_embeddings_state(directory: Path) -> dict[str, Any]:
    """What was noted; if that is damaged, as if the machine had died: the rows themselves will tell."""
    try:
        about = read_document(directory / EMBEDDINGS)
        return {"state": EmbeddingsState(about["state"]), "boot": about["boot"]}
    except (DataLossError, FileNotFoundError, ValueError, KeyError, TypeError):
        return {"state": EmbeddingsState.FLUSHING, "boot": ""}


def verify_rows(directory: Path, generation: Generation) -> EmbeddingsState:
    """Compares the embeddings with the checksums of their arrival; returns and records their state.

    FailedPreconditionError: they were dropped meanwhile. NotFoundError: the generation was removed.
    """
    try:
        wrong = damage(directory / ROWS, directory / JOURNAL, generation.spec)
    except FileNotFoundError:
        wrong = "rows.bin is missing"
    if wrong is None:
        return generation.embeddings
    _require_there(directory, generation)
    if _read_embeddings_state(directory)["state"] is EmbeddingsState.DROPPED:  # noted before any file goes
        raise _just_dropped(generation)
    return lose(directory, generation, wrong)


def _require_there(directory: Path, generation: Generation) -> None:
    """NotFoundError: it is gone; of a run made anew under its name another one may lie here."""
    with suppress(DataLossError, LookupError, TypeError):
        try:
            there = read_document(directory / MANIFEST)["generation"]["push_id"] == generation.push_id
        except FileNotFoundError:
            there = False
        if not there:
            raise NotFoundError(f"generation {generation.number} of run {generation.run!r} was just removed")


def _just_dropped(generation: Generation) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"the embeddings of generation {generation.number} of run {generation.run!r} were just dropped"
    )


def lose(directory: Path, generation: Generation, why: str) -> EmbeddingsState:
    """Notes for good that the embeddings are not what arrived."""
    log.error(
        "run %s generation %d: embeddings lost (%s); the table is served, vector queries are not",
        generation.run,
        generation.number,
        why,
    )
    _write_embeddings_state(directory, EmbeddingsState.LOST)
    return EmbeddingsState.LOST


def flush(directory: Path, generation: Generation) -> EmbeddingsState:
    """Waits until the disk has the embeddings. May take as long as the disk needs for them.

    NotFoundError: the generation was removed.
    """
    fsync_file(directory / ROWS)
    _require_there(directory, generation)
    faults.point("embeddings.flushed")
    _write_embeddings_state(directory, EmbeddingsState.KEPT)
    return EmbeddingsState.KEPT


def drop_embeddings(directory: Path, spares: Spares) -> EmbeddingsState:
    """Frees the embeddings; who has them open keeps them until done."""
    _write_embeddings_state(directory, EmbeddingsState.DROPPED)
    faults.point("retention.state_written")
    spares.keep(directory / ROWS)
    for name in (ROWS, JOURNAL, RESERVE):
        (directory / name).unlink(missing_ok=True)
    faults.point("retention.rows_gone")
    return EmbeddingsState.DROPPED


def pin(directory: Path, *, pinned: bool) -> None:
    """Marks a generation as one to keep, or no longer; on disk when this returns."""
    if pinned:
        (directory / PINNED).touch()
    else:
        (directory / PINNED).unlink(missing_ok=True)
    fsync_directory(directory)


def _write_embeddings_state(directory: Path, state: EmbeddingsState) -> None:
    change_document(directory / EMBEDDINGS, {"state": state, "boot": boot_id()})


def open_rows(directory: Path, generation: Generation) -> RowsFile:
    """The embeddings. DataLossError: they are lost. FailedPreconditionError: they were dropped meanwhile.

    NotFoundError: the generation was removed.
    """
    if generation.embeddings is EmbeddingsState.LOST:
        raise DataLossError(
            f"the embeddings of generation {generation.number} of run {generation.run!r} were damaged or "
            "lost with the machine (its table is still there)"
        )
    generation.require_embeddings()
    try:
        return RowsFile(directory / ROWS, generation.spec)
    except FileNotFoundError:
        _require_there(directory, generation)
        raise _just_dropped(generation) from None


def map_column(directory: Path, generation: Generation, name: str) -> NDArray[Any]:
    """[N, k] of `ids.bin` (int32) or `scores.bin` (float32), mapped read-only. DataLossError: cut short."""
    dtype = "<i4" if name == IDS else "<f4"
    shape = (generation.spec.num_classes, generation.spec.k)
    with (directory / name).open("rb") as file:
        return mapped(file, name, dtype, shape)
