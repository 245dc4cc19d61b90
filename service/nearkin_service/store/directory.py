"""One data directory, opened by one service."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin_service import faults
from nearkin_service.engines.contract import Neighbours
from nearkin_service.errors import DataLossError, LimitExceededError, is_momentary
from nearkin_service.ranges import RowSet
from nearkin_service.store import generation_files as gens
from nearkin_service.store import push_files
from nearkin_service.store.atomic import (
    change_document,
    fsync_directory,
    fsync_file,
    read_document,
    write_document,
)
from nearkin_service.store.fitting import require_fit, require_moment
from nearkin_service.store.layout import DirectoryLock, Layout, new_push_id
from nearkin_service.store.push_files import PushFiles, compare_rows
from nearkin_service.store.reserve import verified_reserve
from nearkin_service.store.rows import RowsFile, as_rows, examine
from nearkin_service.store.spares import Spares
from nearkin_service.values import (
    EmbeddingsState,
    Generation,
    PushSpec,
    PushState,
    RecoveredPush,
    RecoveredRun,
)

log = logging.getLogger("nearkin.store")

_RUN = "run.json"
_KEPT_OUTCOMES = 16
_DAMAGE = (DataLossError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What reading contents that make no sense may end in; it concerns that one thing and no other."""


class DataDirectory:
    """Everything on disk. ValueError: the directory is in use, or of another format."""

    def __init__(self, root: Path) -> None:
        self._lock = DirectoryLock(root)
        faults.point("start.locked")
        self._layout = Layout(root)
        self._layout.prepare()
        self._spares = Spares(self._layout.spares)
        faults.point("start.trash_emptied")
        self.quarantined = 0

    def close(self) -> None:
        self._lock.release()

    # ------------------------------------------------------------------------------------------ start-up

    def recover(self) -> list[RecoveredRun]:
        """What a restarted service finds. Damaged things go to the quarantine; the rest is served."""
        names = sorted(path.name for path in self._layout.runs.iterdir() if path.is_dir())
        return [run for run in map(self._recover_run, names) if run is not None]

    def _recover_run(self, run: str) -> RecoveredRun | None:
        try:
            about = _read_about(self._layout.run(run) / _RUN)
        except (OSError, ValueError, DataLossError) as error:
            if is_momentary(error):
                raise
            if isinstance(error, FileNotFoundError) and self._is_bare(run):
                self._layout.discard(self._layout.runs / run)
                return None
            anew = self._describe_anew(run, error)
            if anew is None:
                return None
            about = anew
        generations = self._recover_generations(run)
        published = {generation.push_id for generation in generations}
        return RecoveredRun(
            name=run,
            created=float(about["created"]),
            last_generation=max([int(about["last_generation"]), *self._numbers(run)]),
            generations=tuple(generations),
            pushes=tuple(self._recover_pushes(run, published)),
        )

    def _describe_anew(self, run: str, error: Exception) -> dict[str, Any] | None:
        """A run whose own description is gone is still made of its generations."""
        try:
            numbers = self._numbers(run)
        except ValueError:
            self._set_aside(self._layout.runs / run, f"run-{run[:64]}", error)
            return None
        log.error("run %s: %s; described anew from its generations", run, error)
        about = {"created": time.time(), "last_generation": max(numbers, default=0)}
        if (self._layout.run(run) / _RUN).is_dir():
            self._set_aside(self._layout.run(run) / _RUN, f"{run}-{_RUN}", error)
        write_document(self._layout.run(run) / _RUN, about)
        return about

    def _is_bare(self, run: str) -> bool:
        """Whether it holds nothing: the service died, or the disk was full, while it was made."""
        made = {self._layout.runs / run / name for name in ("pushes", "generations")}
        return not any(
            path not in made or not path.is_dir() or any(path.iterdir())
            for path in self._layout.runs.joinpath(run).iterdir()
            if path.name != f".{_RUN}.aside"
        )

    def _numbers(self, run: str) -> list[int]:
        directory = self._layout.generations(run)
        if not directory.exists():
            return []
        return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())

    def _recover_generations(self, run: str) -> list[Generation]:
        directory = self._layout.generations(run)
        if not directory.exists():
            return []
        for left in directory.glob(".aside-*"):
            self._layout.discard(left)
        numbers = self._numbers(run)
        return [g for g in (self._recover_generation(run, number) for number in numbers) if g is not None]

    def _recover_generation(self, run: str, number: int) -> Generation | None:
        path = self._layout.generation(run, number)
        try:
            return gens.load(path, run, number)
        except _DAMAGE as error:
            self._note_number(run, number)
            self._set_aside(path, f"{run}-{number}", error)
            return None

    def _recover_pushes(self, run: str, published: set[str]) -> list[RecoveredPush]:
        directory = self._layout.pushes(run)
        found = [self._recover_push(run, path, published) for path in directory.glob("*")]
        pushes = sorted((push for push in found if push is not None), key=lambda push: push.created)
        over = [push for push in pushes if push.state in (PushState.FAILED, PushState.ABORTED)]
        for push in over[:-_KEPT_OUTCOMES]:
            self.forget_push(run, push.push_id)
            pushes.remove(push)
        return pushes

    def _recover_push(self, run: str, path: Path, published: set[str]) -> RecoveredPush | None:
        if path.name in published or not (path / push_files.PUSH).exists():
            self._layout.discard(path)
            return None
        try:
            return push_files.recover(path, run)
        except (*_DAMAGE, OSError) as error:
            if is_momentary(error):
                raise
            self._set_aside(path, f"{run}-push-{path.name[:24]}", error)
            return None

    def _set_aside(self, path: Path, name: str, error: Exception) -> None:
        goal = self._layout.set_aside(path, name)
        self.quarantined += 1
        log.error(
            "%s is damaged (%s): moved to %s and not served; everything else is",
            path.relative_to(self._layout.root),
            error,
            goal.relative_to(self._layout.root),
        )

    # -------------------------------------------------------------------------------------- runs, pushes

    def create_run(self, run: str, created: float) -> None:
        path = self._layout.run(run)
        try:
            for directory in (path, self._layout.pushes(run), self._layout.generations(run)):
                directory.mkdir(exist_ok=True)
            faults.point("run.directories_made")
            write_document(path / _RUN, {"created": created, "last_generation": 0})
            fsync_directory(self._layout.runs)
        except OSError:
            self._layout.discard(path)
            raise
        faults.point("run.made")

    def delete_run(self, run: str) -> None:
        self._layout.discard(self._layout.run(run))

    def require_space(self, spec: PushSpec, promised_bytes: int, min_free_bytes: int) -> None:
        """LimitExceededError: rows and tables would not leave the disk its reserve."""
        needed = spec.expected_bytes + promised_bytes
        if self.free_bytes() - needed < min_free_bytes:
            self._spares.clear()
        free = self.free_bytes()
        if free - needed < min_free_bytes:
            raise LimitExceededError(
                "min_free_disk_bytes",
                f"this push needs {needed:,} bytes (with what open pushes still expect); the data "
                f"directory's disk has {free:,} free, of which {min_free_bytes:,} are kept",
            )

    def create_push(self, spec: PushSpec, created: float, rows_at: int) -> tuple[str, PushFiles]:
        """Row 0 will begin at byte `rows_at` of its file."""
        push_id = new_push_id()
        path = self._layout.push(spec.run, push_id)
        return push_id, PushFiles.create(path, push_id, spec, created, spares=self._spares, rows_at=rows_at)

    def rows_path(self, run: str, push_id: str) -> Path:
        """Of the rows of a push that is open, absolute."""
        return (self._layout.push(run, push_id) / push_files.ROWS).absolute()

    def open_push(self, spec: PushSpec, push_id: str) -> PushFiles:
        return PushFiles(self._layout.push(spec.run, push_id), spec)

    def flush_rows(self, run: str, push_id: str) -> None:
        """Waits until the disk has the rows that a push has so far. FileNotFoundError: it has ended."""
        faults.point(
            "build.flushing_rows"
        )  # beforehand, as a small table may be there before the disk is done
        fsync_file(self.rows_path(run, push_id))

    def finish_push(self, run: str, push_id: str, state: PushState, error: str) -> None:
        """Notes how a push ended. OSError: the disk has no room for that, and nothing of the push is left."""
        try:
            push_files.finish(self._layout.push(run, push_id), state, error, self._spares)
        except OSError:
            self.forget_push(run, push_id)
            raise

    def forget_push(self, run: str, push_id: str) -> None:
        self._layout.discard(self._layout.push(run, push_id))

    # -------------------------------------------------------------------------------------- generations

    def publish(self, finished: gens.Finished) -> Generation:
        """Puts a generation on disk, then says so; its push's own directory goes."""
        run = finished.spec.run
        push_directory = self._layout.push(run, finished.push_id)
        generation = gens.publish(self._layout.generations(run), finished, push_directory)
        faults.point("publish.durable")
        try:
            self._note_number(run, finished.number)
            faults.point("publish.numbered")
            self._layout.discard(push_directory)
            faults.point("publish.push_gone")
        except OSError as error:  # it is published; the next start finds its number, and clears away the push
            log.warning("run %s generation %d: not tidied up: %s", run, finished.number, error)
        return generation

    def _note_number(self, run: str, number: int) -> None:
        path = self._layout.run(run) / _RUN
        about = read_document(path)
        change_document(path, about | {"last_generation": max(number, about["last_generation"])})

    def delete_generation(self, generation: Generation) -> None:
        self._layout.discard(self._layout.generation(generation.run, generation.number))

    def flush(self, generation: Generation) -> EmbeddingsState:
        return gens.flush(self._layout.generation(generation.run, generation.number), generation)

    def drop_embeddings(self, generation: Generation) -> EmbeddingsState:
        path = self._layout.generation(generation.run, generation.number)
        return gens.drop_embeddings(path, self._spares)

    def pin(self, generation: Generation, *, pinned: bool) -> None:
        """FileNotFoundError: the generation was removed."""
        gens.pin(self._layout.generation(generation.run, generation.number), pinned=pinned)

    def verify_rows(self, generation: Generation) -> EmbeddingsState:
        return gens.verify_rows(self._layout.generation(generation.run, generation.number), generation)

    def open_rows(self, generation: Generation) -> RowsFile:
        return gens.open_rows(self._layout.generation(generation.run, generation.number), generation)

    def absent(self, generation: Generation) -> NDArray[np.int64]:
        """FileNotFoundError: the generation was removed."""
        return gens.read_absent(self._layout.generation(generation.run, generation.number), generation)

    def compare(self, generation: Generation, start: int, payload: memoryview, crc: int | None) -> None:
        """Compares rows sent again with a published generation's. AlreadyExistsError: they differ."""
        rows = as_rows(payload, generation.spec)
        examine(rows, generation.spec.dtype).require(crc, start)
        absent = RowSet.from_ids(self.absent(generation))
        file = self.open_rows(generation)
        try:
            compare_rows(file, rows, start, RowSet.of(start, start + len(rows)), absent)
        finally:
            file.close()

    def map_column(self, generation: Generation, name: str) -> NDArray[Any]:
        """[N, k] of the table, mapped read-only. FileNotFoundError: the generation was removed."""
        return gens.map_column(self._layout.generation(generation.run, generation.number), generation, name)

    def verified_table(self, generation: Generation) -> tuple[NDArray[Any], NDArray[Any]]:
        """Ids and scores as they were published. DataLossError: they are damaged or gone."""
        return gens.verified_table(self._layout.generation(generation.run, generation.number), generation)

    def reserve(self, generation: Generation) -> Neighbours | None:
        """What its build noted beyond the k-th places; None, and the log says why, if that is not to be had.

        It only saves time, so whatever became of it is nobody's trouble.
        """
        path = self._layout.generation(generation.run, generation.number)
        try:
            return verified_reserve(path, generation)
        except (DataLossError, OSError) as trouble:
            log.warning(
                "run %s generation %d: updated without its reserve: %s",
                generation.run,
                generation.number,
                trouble,
            )
            return None

    def column_path(self, generation: Generation, name: str) -> Path:
        """The absolute path of `ids.bin` or `scores.bin`."""
        return (self._layout.generation(generation.run, generation.number) / name).absolute()

    def free_bytes(self) -> int:
        return shutil.disk_usage(self._layout.root).free


def _read_about(path: Path) -> dict[str, Any]:
    """What a run says of itself. DataLossError: it is damaged, or says what cannot be."""
    about = read_document(path)
    require_moment(about.get("created"), f"{_RUN}.created")
    require_fit(about.get("last_generation"), int, f"{_RUN}.last_generation")
    return about
