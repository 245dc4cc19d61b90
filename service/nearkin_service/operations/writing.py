"""Storing rows: one message after another, each whole or not at all.

A message holds its rows while it is stored: nobody else writes any of them; who comes later is compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nearkin_service.catalogue import Push
from nearkin_service.errors import AlreadyExistsError, InvalidArgumentError
from nearkin_service.operations.core import Core
from nearkin_service.operations.lending import Loan
from nearkin_service.operations.pushing import Pushing
from nearkin_service.ranges import RowRange, RowSet
from nearkin_service.store import PushFiles
from nearkin_service.values import Ending, Generation, PushState, PushView

_ANNOUNCE_SECONDS = 0.2
_MOST_BYTES_IN_PLACE = 256 << 20  # a look at them takes one of the threads for files 50 milliseconds


@dataclass(frozen=True, slots=True)
class Message:
    """One message's rows.

    Attributes:
        push_id, row_start: where they belong.
        payload: their bytes.
        crc: what the sender says of them.
    """

    push_id: str
    row_start: int
    payload: memoryview
    crc: int | None


@dataclass(frozen=True, slots=True)
class Held:
    """Rows that a message holds: until `settle`, or until the push releases them, nobody else writes any.

    Methods run on any thread, and return the rows that hold nothing but zeros. Their errors are those of
    `Writing.write`.

    Attributes:
        store: stores or compares these bytes, which came with this checksum; all or nothing.
        files: where nothing of the rows is stored yet, and the push is open.
    """

    push: Push
    rows: RowRange
    store: Callable[[memoryview, int | None], RowSet]
    files: PushFiles | None

    def receive(
        self,
        fill: Callable[[memoryview], None],
        room: Callable[[int, int], memoryview],
        ending: Ending,
    ) -> RowSet:
        """The same for bytes that `fill` receives into a `room` for so many, aligned as this place in a file.

        If they are new, each piece is summed up and written while it is in a core's cache.
        """
        if self.files is not None:
            return self.files.receive_as_they_come(self.rows, fill, room, ending, self.push.absent)
        payload = room(len(self.rows) * self.push.spec.row_bytes, 0)
        fill(payload)
        crc, _ = ending.said()
        return self.store(payload, crc)


class Writing:
    """Rows on their way into pushes. Lives on the event loop."""

    def __init__(self, core: Core, pushing: Pushing) -> None:
        self._core = core
        self._pushing = pushing

    async def write(self, message: Message, loan: Loan | None = None) -> PushView:
        """Stores a message's rows, or compares them with what is stored; all of it or nothing.

        DataLossError: not what was sent. InvalidArgumentError: not whole rows, not there, NaN or Inf.
        AlreadyExistsError: a row is stored with other bytes. FailedPreconditionError: the push is over.
        """
        held = await self.hold(message.push_id, message.row_start, message.payload.nbytes, loan)
        try:
            zeros = await self._core.io(held.store, message.payload, message.crc)
        except BaseException:
            held.push.release(held.rows)
            raise
        await self.settle(held, zeros)
        return held.push.view()

    async def hold(self, push_id: str, row_start: int, nbytes: int, loan: Loan | None = None) -> Held:
        """Waits for a message's rows, which are its own until `settle`, or until the push releases them."""
        push = self._core.catalogue.push(push_id)
        push.require_usable()
        rows = push.spec.rows_of(row_start, nbytes)
        await push.hold(rows, loan.rows if loan else None)
        try:
            push.require_usable()
            return self._held(push, rows)
        except BaseException:
            push.release(rows)
            raise

    async def settle(self, held: Held, zeros: RowSet) -> None:
        """Takes note of rows that were stored, and lets them go. The errors of a commit."""
        held.push.arrived(held.rows, zeros)
        held.push.release(held.rows)
        await self._stored(held.push, held.rows)

    def _held(self, push: Push, rows: RowRange) -> Held:
        if push.state is PushState.PUBLISHED:
            generation = self._core.catalogue.generation_of(push)
            return Held(push, rows, partial(self._compare, generation, rows.start), None)
        files = self._core.files[push.push_id]
        # Once the push is closed every row counts as known: one that never came is absent, and ignored.
        known = push.stored if push.state is PushState.OPEN else RowSet.of(rows.start, rows.stop)
        known = known.within(rows.start, rows.stop)
        store = partial(files.receive, rows, known, push.absent)
        return Held(push, rows, store, None if len(known) else files)

    def _compare(
        self, generation: Generation, row_start: int, payload: memoryview, crc: int | None
    ) -> RowSet:
        with self._core.catalogue.kept(generation):
            self._core.directory.compare(generation, row_start, payload, crc)
        return RowSet.empty()

    @property
    def most_bytes_in_place(self) -> int:
        """Of the rows that one message may speak of without bringing them."""
        return max(_MOST_BYTES_IN_PLACE, self._core.config.limits.max_message_bytes)

    async def write_in_place(
        self, push_id: str, row_start: int, count: int, crc: int | None, loan: Loan, *, sound: bool
    ) -> PushView:
        """Takes rows that lie where they belong: `loan`'s caller has written them. The errors of `write`.

        Rows whose writer says that they are `sound` are taken unseen: the build reads them anyway, and takes
        none that are not what `crc` says, or that have no direction.
        """
        push = self._core.catalogue.push(push_id)
        push.require_usable()
        most = self.most_bytes_in_place
        if not 0 < count * push.spec.row_bytes <= most:
            raise InvalidArgumentError("shared_row_count", f"{count} rows are not 1 to {most:,} bytes")
        if crc is None:
            raise InvalidArgumentError("crc32c", "rows that were written in place need one")
        rows = RowRange(row_start, row_start + count)
        if not loan.rows.start <= rows.start <= rows.stop <= loan.rows.stop:
            raise InvalidArgumentError("row_start", f"rows {rows.start}..{rows.stop - 1} are not lent")
        async with push.claim(rows, loan.rows):
            push.require_usable()
            known = push.stored.within(rows.start, rows.stop)
            if not push.is_lent(loan.rows) and len(known) < count:
                raise InvalidArgumentError("loan", "it is over; send payloads")
            if push.state is PushState.OPEN:
                files, absent = self._core.files[push_id], push.absent
                if sound and not len(known):
                    zeros = await self._core.io(files.take_in_place, rows, crc)
                else:
                    zeros = await self._core.io(files.receive_in_place, rows, crc, known, absent)
                push.arrived(rows, zeros)
            elif await self._core.io(self._pushing.checksum, push, rows) != crc:
                raise AlreadyExistsError(f"rows {rows.start}..{rows.stop - 1} are stored with other bytes")
        await self._stored(push, rows)
        return push.view()

    async def _stored(self, push: Push, rows: RowRange) -> None:
        self._core.metrics.push_bytes.inc(len(rows) * push.spec.row_bytes)
        self._core.pacing.rows_arrived(len(rows) * push.spec.row_bytes)
        self._announce(push)
        await self._pushing.commit_if_complete(push)

    def _announce(self, push: Push) -> None:
        """Tells watchers of arriving rows, a few times a second."""
        now = time.monotonic()
        if now - push.announced >= _ANNOUNCE_SECONDS:
            push.announced = now
            self._core.catalogue.rows_arrived(push)
