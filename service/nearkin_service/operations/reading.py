"""Neighbour tables: finding the right generation, waiting for it, cutting it into blocks."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from nearkin.v1.checksums import crc32c
from numpy.typing import NDArray

from nearkin_service.errors import InvalidArgumentError, LimitExceededError, NotFoundError, NotInTimeError
from nearkin_service.operations.core import Core
from nearkin_service.ranges import RowRange
from nearkin_service.store import IDS, SCORES, as_bytes
from nearkin_service.values import FileChecksums, Generation, PushState, check_run_name


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one column with the checksum of their bytes; `payload` lies in the mapped file."""

    rows: RowRange
    crc: int
    payload: memoryview


@dataclass(frozen=True, slots=True)
class TableBlocks:
    """One column [N, k] of a `table`, mapped, cut where its manifest has checksums."""

    table: NDArray[Any]
    checksums: FileChecksums

    def cut(self, rows: RowRange) -> Iterator[RowRange]:
        """The ranges to send, none across a block's edge."""
        step, start = self.checksums.block_rows, rows.start
        while start < rows.stop:
            stop = min((start // step + 1) * step, rows.stop)
            yield RowRange(start, stop)
            start = stop

    def block(self, rows: RowRange) -> Block:
        """Reads a range. A whole block carries the checksum it was published with: later damage shows."""
        payload = as_bytes(np.asarray(self.table[rows.start : rows.stop]))
        number, step = rows.start // self.checksums.block_rows, self.checksums.block_rows
        whole = RowRange(number * step, min((number + 1) * step, len(self.table)))
        crc = self.checksums.blocks[number] if rows == whole else crc32c(payload)
        return Block(rows, crc, payload)


class Reading:
    """What readers of tables ask for."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._waiting: Counter[str] = Counter()

    def generation(self, run: str, number: int) -> Generation:
        """A generation by its number; 0: the newest. NotFoundError: no such run or generation."""
        if number < 0:
            raise InvalidArgumentError("generation", f"{number} is negative")
        return self._core.catalogue.run(check_run_name(run)).generation(number)

    async def since(self, run: str, epoch: int, seconds: float | None) -> Generation:
        """The newest generation of this epoch or a later one, waited for.

        A run that does not exist yet is waited for as well. FailedPreconditionError: the epoch's push came to
        nothing. NotInTimeError: `seconds` went by. NotFoundError: the run was deleted meanwhile.
        """
        check_run_name(run)
        if epoch < 0:
            raise InvalidArgumentError("min_epoch", f"{epoch} is negative")
        found = self._look(run, epoch)
        if found is not None:
            return found
        with self._counted(run):
            try:
                async with asyncio.timeout(seconds):
                    return await self._wait(run, epoch)
            except TimeoutError:
                raise NotInTimeError(self._why_not_yet(run, epoch)) from None

    def _look(self, name: str, epoch: int) -> Generation | None:
        run = self._core.catalogue.runs.get(name)
        found = run.since(epoch) if run else None
        if run is not None and found is None:
            run.require_hope(epoch)
        return found

    async def _wait(self, name: str, epoch: int) -> Generation:
        existed = name in self._core.catalogue.runs
        while True:
            found = self._look(name, epoch)
            if found is not None:
                return found
            self._core.refuse_when_draining()
            await self._core.catalogue.changed.wait()
            if existed and name not in self._core.catalogue.runs:
                raise NotFoundError(f"run {name!r} was deleted")
            existed = name in self._core.catalogue.runs

    @contextmanager
    def _counted(self, run: str) -> Iterator[None]:
        limits = self._core.config.limits
        counts = {
            "max_waiting_readers": self._waiting.total(),
            "max_waiting_readers_per_run": self._waiting[run],
        }
        for name, waiting in counts.items():
            if waiting >= getattr(limits, name):
                raise LimitExceededError(name, f"{waiting} readers wait already; try again")
        self._count(run, 1)
        try:
            yield
        finally:
            self._count(run, -1)

    def _count(self, run: str, change: int) -> None:
        self._waiting[run] += change
        if not self._waiting[run]:
            del self._waiting[run]
        self._core.metrics.waiting_readers.set(self._waiting.total())

    def _why_not_yet(self, name: str, epoch: int) -> str:
        run = self._core.catalogue.runs.get(name)
        if run is None:
            return f"there is no run {name!r} yet"
        push = run.pushes.get(epoch)
        if push is None:
            return f"epoch {epoch} of run {name!r} was not pushed in time; the newest is {_epoch(run.newest)}"
        waits = ""
        if push.state is PushState.OPEN:
            missing = push.missing_count
            waits = f", {missing} rows are missing" if missing else ", all rows are there, to be committed"
        return f"epoch {epoch} of run {name!r} was not published in time: its push is {push.state}{waits}"

    async def columns(self, generation: Generation, *, scores: bool) -> list[TableBlocks]:
        """Ids and, if asked for, scores. NotFoundError: the generation was just removed."""
        wanted = [(IDS, generation.ids), (SCORES, generation.scores)][: 2 if scores else 1]
        return [
            TableBlocks(await self._core.io(self._column, generation, name), checksums)
            for name, checksums in wanted
        ]

    def _column(self, generation: Generation, name: str) -> NDArray[Any]:
        with self._core.catalogue.kept(generation):
            return self._core.directory.map_column(generation, name)

    @contextmanager
    def opened(self, generation: Generation, *, scores: bool) -> Iterator[list[tuple[TableBlocks, int]]]:
        """The same with their files' descriptors; what is open outlives its removal. Any thread.

        NotFoundError: the generation was just removed.
        """
        directory = self._core.directory
        wanted = [(IDS, generation.ids), (SCORES, generation.scores)][: 2 if scores else 1]
        columns: list[tuple[TableBlocks, int]] = []
        try:
            with self._core.catalogue.kept(generation):
                for name, checksums in wanted:
                    blocks = TableBlocks(directory.map_column(generation, name), checksums)
                    path = directory.column_path(generation, name)
                    columns.append((blocks, os.open(path, os.O_RDONLY | os.O_CLOEXEC)))
            yield columns
        finally:
            for _, descriptor in columns:
                os.close(descriptor)

    def paths(self, generation: Generation) -> tuple[str, str]:
        """Where ids and scores lie, for a caller on this host to map; what is mapped outlives its removal."""
        ids, scores = (self._core.directory.column_path(generation, name) for name in (IDS, SCORES))
        return str(ids), str(scores)

    async def load(self, blocks: TableBlocks, rows: RowRange) -> Block:
        return await self._core.io(blocks.block, rows)


def _epoch(generation: Generation | None) -> str:
    return "none" if generation is None else f"epoch {generation.epoch}"
