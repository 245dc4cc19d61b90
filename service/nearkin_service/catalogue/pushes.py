"""One push's state: what has arrived, who is writing which rows just now, how it ended."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nearkin_service.catalogue.signal import Signal
from nearkin_service.errors import FailedPreconditionError, InvalidArgumentError
from nearkin_service.ranges import RowRange, RowSet
from nearkin_service.values import LIVE, Generation, PushSpec, PushState, PushView, RecoveredPush


class Push:
    """Changed on the event loop only."""

    def __init__(self, push_id: str, spec: PushSpec, created: float) -> None:
        self.push_id = push_id
        self.spec = spec
        self.created = created
        self.state = PushState.OPEN
        self.stored = RowSet.empty()
        self.zeros = RowSet.empty()
        self.absent = RowSet.empty()
        self.commit_when_complete = False
        self.publishing = False
        self.generation = 0
        self.announced = 0.0  # when watchers last heard of arriving rows, on the monotonic clock
        self._published_absent = 0
        self.error = ""
        self._claims: list[RowRange] = []
        self._released = Signal()

    @staticmethod
    def recovered(found: RecoveredPush) -> Push:
        push = Push(found.push_id, found.spec, found.created)
        push.state, push.error = found.state, found.error
        push.stored, push.zeros, push.absent = found.stored, found.zeros, found.absent
        push.commit_when_complete = found.commit_when_complete
        return push

    @staticmethod
    def of_generation(generation: Generation) -> Push:
        """The push that a published generation came from, as far as anyone may still ask."""
        push = Push(generation.push_id, generation.spec, generation.published)
        push.publish(generation)
        return push

    @property
    def live(self) -> bool:
        return self.state in LIVE

    @property
    def missing(self) -> RowSet:
        """Rows that have neither arrived nor been declared absent."""
        return self.stored.union(self.absent).complement(0, self.spec.num_classes)

    @property
    def complete(self) -> bool:
        """Whether no row is missing; costs next to nothing while many are."""
        return len(self.stored) + len(self.absent) >= self.spec.num_classes and not len(self.missing)

    def publish(self, generation: Generation) -> None:
        self.state = PushState.PUBLISHED
        self.generation = generation.number
        self._published_absent = generation.absent_count
        self.stored = RowSet.of(0, self.spec.num_classes)
        self.zeros = RowSet.empty()

    def end(self, state: PushState, error: str) -> None:
        """It came to nothing."""
        self.state, self.error = state, error
        self.stored = self.zeros = RowSet.empty()

    def view(self) -> PushView:
        return PushView(
            push_id=self.push_id,
            spec=self.spec,
            state=self.state,
            stored=self.stored,
            absent_count=self._published_absent or len(self.absent),
            created=self.created,
            complete=self.complete,
            generation=self.generation,
            error=self.error,
        )

    def require_usable(self) -> None:
        """FailedPreconditionError: it failed or was aborted."""
        if self.state in (PushState.FAILED, PushState.ABORTED):
            was = "was " if self.state is PushState.ABORTED else ""
            why = f": {self.error}" if self.error else ""
            raise FailedPreconditionError(
                f"the push of epoch {self.spec.epoch} {was}{self.state}{why}; begin the epoch again"
            )

    def require_complete(self) -> None:
        """FailedPreconditionError: rows are missing. InvalidArgumentError: a row is zero and not absent."""
        missing = self.missing
        gap = missing.first
        if gap is not None:
            raise FailedPreconditionError(
                f"{len(missing)} rows are missing, the first are {gap.start}..{gap.stop - 1}; send them, "
                "or declare their classes absent"
            )
        zero = self.zeros.minus(self.absent).first
        if zero is not None:
            raise InvalidArgumentError(
                "payload",
                f"row {zero.start} is all zero and has no direction; a class without an embedding is to be "
                "declared absent",
            )

    def arrived(self, rows: RowRange, zeros: RowSet) -> None:
        if self.state is PushState.OPEN:
            self.stored = self.stored.union(RowSet.of(rows.start, rows.stop))
            self.zeros = self.zeros.union(zeros)

    @asynccontextmanager
    async def claim(self, rows: RowRange) -> AsyncIterator[None]:
        """Waits until nobody else writes any of these rows, then holds them."""
        while any(claim.overlaps(rows) for claim in self._claims):
            await self._released.wait()
        self._claims.append(rows)
        try:
            yield
        finally:
            self._claims.remove(rows)
            self._released.fire()

    async def idle(self) -> None:
        """Until nobody is writing."""
        while self._claims:
            await self._released.wait()
