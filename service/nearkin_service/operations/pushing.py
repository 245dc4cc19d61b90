"""Opening pushes, closing and dropping them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing

import numpy as np
from numpy.typing import NDArray

from nearkin_service.catalogue import Push, Run
from nearkin_service.errors import (
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    LimitExceededError,
)
from nearkin_service.operations.builds import Builds
from nearkin_service.operations.composing import Composing, declare
from nearkin_service.operations.core import Core
from nearkin_service.ranges import RowRange, RowSet
from nearkin_service.values import Generation, PushSpec, PushState, PushView

log = logging.getLogger("nearkin.push")


class Pushing:
    """The life of a push up to its build."""

    def __init__(self, core: Core, builds: Builds) -> None:
        self._core = core
        self._builds = builds
        self._composing = Composing(core)
        self._creating_run = asyncio.Lock()
        self._opening: list[PushSpec] = []  # pushes that count already, and are not in the catalogue yet

    # ------------------------------------------------------------------------------------------ beginning

    async def begin(
        self,
        spec: PushSpec,
        absent: Callable[[], NDArray[np.int64]],
        *,
        commit_when_complete: bool,
        rows_at: int = 0,
    ) -> PushView:
        """Opens the push of an epoch or joins it. `absent` is called on another thread.

        A file made for it has its row 0 at byte `rows_at`.

        AlreadyExistsError: the epoch has a push or generation with other arguments. LimitExceededError: one
        of the service's limits, or the disk's.
        """
        self._core.refuse_when_draining()
        self._require_limits(spec)
        self._core.require_engine(spec.engine)
        self._core.pacing.rows_arrived(0)  # the first are on their way
        declared = await self._core.io(_declared, absent, spec.num_classes)
        async with self._locked_run(spec) as run:
            push = run.pushes.get(spec.epoch)
            if push is None or push.state in (PushState.FAILED, PushState.ABORTED):
                push = await self._create(run, spec, rows_at)
            elif difference := push.spec.difference(spec):
                raise AlreadyExistsError(
                    f"epoch {spec.epoch} of run {run.name!r} is pushed already, and its {difference}"
                )
            async with push.in_use():
                await self._join(push, declared, commit_when_complete=commit_when_complete)
        await self.commit_if_complete(push)
        return push.view()

    def _require_limits(self, spec: PushSpec) -> None:
        limits = self._core.config.limits
        asked = {
            "max_num_classes": spec.num_classes,
            "max_row_bytes": spec.row_bytes,
            "max_push_bytes": spec.rows_bytes,
            "max_k": spec.k,
            "max_memory_bytes": spec.build_bytes,
        }
        for name, value in asked.items():
            if value > getattr(limits, name):
                raise LimitExceededError(name, f"{value:,} is above this service's {getattr(limits, name):,}")

    @asynccontextmanager
    async def _locked_run(self, spec: PushSpec) -> AsyncIterator[Run]:
        """A run that nobody else changes: made if there is none, anew if it was deleted meanwhile."""
        while True:
            run = await self._run(spec)
            async with run.lock:
                if self._core.catalogue.runs.get(run.name) is run:
                    yield run
                    return

    async def _run(self, spec: PushSpec) -> Run:
        async with self._creating_run:
            catalogue = self._core.catalogue
            if spec.run not in catalogue.runs:
                if len(catalogue.runs) >= self._core.config.limits.max_runs:
                    raise LimitExceededError("max_runs", f"there are {len(catalogue.runs)} runs; delete one")
                self._require_room_for_push(None)
                await self._require_disk(spec)  # or a run would be left that nobody pushes to
                run = Run(spec.run, time.time())
                await self._core.io(self._core.directory.create_run, run.name, run.created)
                catalogue.add_run(run)
            return catalogue.runs[spec.run]

    def _require_room_for_push(self, run: Run | None) -> None:
        limits = self._core.config.limits
        everywhere = len(self._core.catalogue.open_pushes) + len(self._opening)
        if everywhere >= limits.max_open_pushes:
            raise LimitExceededError(
                "max_open_pushes", f"{everywhere} pushes are open or being built; wait for one"
            )
        if run is None:
            return
        if len(run.live_pushes) >= limits.max_open_pushes_per_run:
            epochs = ", ".join(str(push.spec.epoch) for push in run.live_pushes)
            raise LimitExceededError(
                "max_open_pushes_per_run",
                f"epochs {epochs} of run {run.name!r} are open or being built; abort one",
            )
        if len(run.generations) >= limits.max_generations_per_run:
            raise LimitExceededError(
                "max_generations_per_run", f"run {run.name!r} has {len(run.generations)}; delete some"
            )

    def _require_share(self, run: Run, spec: PushSpec) -> None:
        """No run may fill the disk on its own."""
        limit = self._core.config.limits.max_run_bytes
        published = sum(g.bytes_on_disk for g in run.generations.values())
        expected = sum(push.spec.expected_bytes for push in run.live_pushes)
        needed = published + expected + spec.expected_bytes
        if needed > limit:
            raise LimitExceededError(
                "max_run_bytes",
                f"run {run.name!r} would have {needed:,} bytes on disk, of {limit:,} that a run may have; "
                "delete generations, or keep fewer with its retention",
            )

    async def _create(self, run: Run, spec: PushSpec, rows_at: int) -> Push:
        self._require_room_for_push(run)
        self._require_share(run, spec)
        if spec.base_generation:
            self._composing.base(spec)
        core = self._core
        enough = self._require_disk(spec)
        self._opening.append(spec)
        try:
            await enough
            created = time.time()
            push_id, files = await core.io(core.directory.create_push, spec, created, rows_at)
            core.files[push_id] = files
            push = Push(push_id, spec, created)
            core.catalogue.add_push(run, push)
        finally:
            self._opening.remove(spec)
        core.spawn(core.io(files.settle))  # while its rows come
        log.info(
            "run %s epoch %d: push %s opened, %d rows of %s %s, k %d",
            spec.run,
            spec.epoch,
            push_id,
            spec.num_classes,
            list(spec.row_shape),
            spec.dtype,
            spec.k,
        )
        return push

    def _require_disk(self, spec: PushSpec) -> Awaitable[None]:
        """Beside what other pushes still expect. LimitExceededError: there is not enough."""
        core = self._core
        promised = sum(
            p.spec.expected_bytes - len(p.stored) * p.spec.row_bytes for p in core.catalogue.open_pushes
        ) + sum(other.expected_bytes for other in self._opening)
        return core.io(core.directory.require_space, spec, promised, core.config.limits.min_free_disk_bytes)

    async def _join(self, push: Push, declared: RowSet, *, commit_when_complete: bool) -> None:
        if push.state is not PushState.OPEN:
            return await self._require_declared_before(push, declared)
        files, fresh = self._core.files[push.push_id], await self._core.io(declared.minus, push.absent)
        if len(fresh):
            await self._core.io(files.note_absent, fresh)
            await declare(self._core, push, fresh)
            self._core.catalogue.rows_arrived(push)
        if commit_when_complete and not push.commit_when_complete:
            await self._core.io(files.note_commit_when_complete)
            push.commit_when_complete = True
        return None

    async def _require_declared_before(self, push: Push, declared: RowSet) -> None:
        known = await self._absent(push) if len(declared) else push.absent
        new = (await self._core.io(declared.minus, known)).first
        if new is not None:
            raise AlreadyExistsError(
                f"epoch {push.spec.epoch} of run {push.spec.run!r} is {push.state} already, and in it class "
                f"{new.start} is not absent"
            )

    async def _absent(self, push: Push) -> RowSet:
        if push.state is not PushState.PUBLISHED:
            return push.absent
        return await self._core.io(self._read_absent, self._core.catalogue.generation_of(push))

    def _read_absent(self, generation: Generation) -> RowSet:
        with self._core.catalogue.kept(generation):
            return RowSet.from_ids(self._core.directory.absent(generation))

    # ------------------------------------------------------------------------------------------- closing

    async def commit(self, push_id: str, rows_crc: int | None) -> PushView:
        """Closes a push whose rows are all there; its build follows. The protocol lists the errors."""
        push = self._core.catalogue.push(push_id)
        push.require_usable()
        if push.state is PushState.OPEN:
            await self._composing.compose(push)
            await self._require_complete(push)
        if rows_crc is not None:
            everything = RowRange(0, push.spec.num_classes)
            async with push.claim(everything):
                push.require_usable()
                await self._blank(push)
                await self._require_checksum(push, everything, rows_crc)
        await self._close(push)
        push.require_usable()
        return push.view()

    async def vouch(self, push_id: str, rows: RowRange, rows_crc: int | None) -> PushView:
        """Takes a sender's word for his rows; with the last such the push closes. The errors of `commit`."""
        push = self._core.catalogue.push(push_id)
        total = push.spec.num_classes
        if not 0 <= rows.start <= rows.stop <= total:
            count = rows.stop - rows.start
            raise InvalidArgumentError(
                "part", f"{count} rows from row {rows.start} on are not within 0..{total - 1}"
            )
        async with push.claim(rows):
            push.require_usable()
            await self._core.io(push.require_stored, rows)
            absent = await self._absent(push)
            if rows_crc is not None and not len(absent.within(rows.start, rows.stop)):
                await self._require_checksum(push, rows, rows_crc)
            if push.state is PushState.OPEN and len(rows):
                await self._core.io(self._core.files[push_id].note_vouched, rows)
                push.vouched = push.vouched.union(RowSet.of(rows.start, rows.stop))
        await self.commit_if_complete(push)
        push.require_usable()
        return push.view()

    async def resume(self, push: Push) -> None:
        """What an earlier service left: it may have died between the last row and its commit."""
        await self.commit_if_complete(push)

    async def commit_if_complete(self, push: Push) -> None:
        """Closes a push that is to be closed by itself, if its last row is there. The errors of `commit`."""
        if push.state is PushState.OPEN and push.complete and await self._core.io(lambda: push.closes_itself):
            await self._require_complete(push)
            await self._close(push)

    async def _require_complete(self, push: Push) -> None:
        """A zero row ends the push: its epoch can be begun again with the class declared absent."""
        try:
            await self._core.io(push.require_complete)
        except InvalidArgumentError as error:
            await self._builds.end(push, PushState.FAILED, error.reason)
            raise

    async def _blank(self, push: Push) -> None:
        """Zeroes what never came, for who has a claim on every row: another epoch's rows may lie there."""
        never = await self._core.io(push.absent.minus, push.stored)
        if push.state is PushState.OPEN and len(never):
            await self._core.io(self._core.files[push.push_id].blank, never)

    async def _require_checksum(self, push: Push, rows: RowRange, expected: int) -> None:
        found = await self._core.io(self._checksum_on_arrival, push, rows)
        if found != expected:
            raise DataLossError(
                f"rows_crc32c is {expected:#010x} but that of the stored rows is {found:#010x}; abort the "
                "push and send its rows again"
            )

    def _checksum_on_arrival(self, push: Push, rows: RowRange) -> int:
        files = self._core.files.get(push.push_id)
        return files.checksum(rows) if files else self.checksum(push, rows)

    def checksum(self, push: Push, rows: RowRange) -> int:
        """Of rows of a push that is closed, as they lie in its file."""
        files = self._core.files.get(push.push_id)
        if files is not None:
            return files.rows.checksum(rows.start, len(rows))
        generation = self._core.catalogue.generation_of(push)
        with (
            self._core.catalogue.kept(generation),
            closing(self._core.directory.open_rows(generation)) as file,
        ):
            return file.checksum(rows.start, len(rows))

    async def _close(self, push: Push) -> None:
        """Does nothing for a push that is no longer open."""
        async with push.claim(RowRange(0, push.spec.num_classes)):
            await self._blank(push)
            if push.state is not PushState.OPEN:
                return
            push.state = PushState.BUILDING
            files = self._core.files[push.push_id]
            try:
                await self._core.io(files.note_committed)
            except BaseException:
                if push.state is PushState.BUILDING:
                    push.state = PushState.OPEN
                raise
        if push.state is PushState.BUILDING:  # nobody has dropped it meanwhile
            self._core.spawn(self._core.io(files.settle))
            self._core.catalogue.push_changed(push)
            self._builds.enqueue(push)

    async def abort(self, push_id: str) -> PushView:
        """Drops an open push or cancels its build. FailedPreconditionError: it is published already."""
        push = self._core.catalogue.push(push_id)
        while push.publishing and push.live:
            await self._core.catalogue.changed.wait()
        if push.state is PushState.PUBLISHED:
            raise FailedPreconditionError(
                f"epoch {push.spec.epoch} of run {push.spec.run!r} is published as generation "
                f"{push.generation}; delete that instead"
            )
        if push.live:
            await self._builds.end(push, PushState.ABORTED, "")
        return push.view()

    def get(self, push_id: str) -> PushView:
        return self._core.catalogue.push(push_id).view()


def _declared(absent: Callable[[], NDArray[np.int64]], num_classes: int) -> RowSet:
    ids = absent()
    outside = ids[(ids < 0) | (ids >= num_classes)]
    if len(outside):
        raise InvalidArgumentError("absent", f"class {int(outside[0])} is not within 0..{num_classes - 1}")
    return RowSet.from_ids(ids)
