"""One push's state: what has arrived, who is writing which rows just now, how it ended."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

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
        self._both = 0  # rows that are stored and absent: counted, as there may be millions of ranges
        self.commit_when_complete = False
        self.vouched = RowSet.empty()  # rows that a sender has summed up, as they are to close the push
        self.publishing = False
        self.generation = 0
        self.announced = 0.0  # when watchers last heard of arriving rows, on the monotonic clock
        self._published_absent = 0
        self.error = ""
        self._claims: list[RowRange] = []
        self._loans: list[RowRange] = []  # claims too
        self._released = Signal()

    @staticmethod
    def recovered(found: RecoveredPush) -> Push:
        push = Push(found.push_id, found.spec, found.created)
        push.state, push.error = found.state, found.error
        push.stored, push.zeros = found.stored, found.zeros
        push.declare(found.absent, found.stored.overlap(found.absent), found.stored)
        push.commit_when_complete, push.vouched = found.commit_when_complete, found.vouched
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
        """Whether no row is missing."""
        return not self.missing_count

    @property
    def closes_itself(self) -> bool:
        """Whether the last row closes it: somebody said so, or every sender has vouched for his."""
        if self.commit_when_complete or not len(self.vouched):
            return self.commit_when_complete
        return len(self.vouched.union(self.absent)) == self.spec.num_classes

    @property
    def missing_count(self) -> int:
        """How many are; costs next to nothing, unlike `missing`."""
        return max(self.spec.num_classes - len(self.stored) - len(self.absent) + self._both, 0)

    def publish(self, generation: Generation) -> None:
        self.state = PushState.PUBLISHED
        self.generation = generation.number
        self._published_absent = generation.absent_count
        self.stored = RowSet.of(0, self.spec.num_classes)
        self.zeros = RowSet.empty()
        self._take_all_back()

    def end(self, state: PushState, error: str) -> None:
        """It came to nothing."""
        self.state, self.error = state, error
        self.stored = self.zeros = RowSet.empty()
        self._both = 0
        self._take_all_back()

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

    def require_stored(self, rows: RowRange) -> None:
        """FailedPreconditionError: some of these are missing."""
        missing = self.missing.within(rows.start, rows.stop)
        gap = missing.first
        if gap is not None:
            self.require_usable()  # one that has just ended has no rows any more
            raise FailedPreconditionError(
                f"{len(missing)} rows are missing, the first are {gap.start}..{gap.stop - 1}; send them, "
                "or declare their classes absent"
            )

    def require_complete(self) -> None:
        """FailedPreconditionError: rows are missing. InvalidArgumentError: a row is zero and not absent."""
        self.require_stored(RowRange(0, self.spec.num_classes))
        zero = self.zeros.minus(self.absent).first
        if zero is not None:
            raise InvalidArgumentError(
                "payload",
                f"row {zero.start} is all zero and has no direction; a class without an embedding is to be "
                "declared absent",
            )

    def arrived(self, rows: RowRange, zeros: RowSet) -> None:
        if self.state is PushState.OPEN:
            fresh = RowSet.of(rows.start, rows.stop).minus(self.stored)
            self._both += fresh.overlap(self.absent)
            self.stored = self.stored.union(fresh)
            self.zeros = self.zeros.union(zeros)
        for loan in list(self._loans):
            if loan.overlaps(rows) and len(self.stored.within(loan.start, loan.stop)) == len(loan):
                self.take_back(loan)

    def declare(self, absent: RowSet, both: int, stored: RowSet) -> None:
        """All that is absent; of these classes `both` were `stored` when they were counted."""
        self._both = both + self.stored.minus(stored).overlap(absent)
        self.absent = absent

    @asynccontextmanager
    async def claim(self, rows: RowRange, loan: RowRange | None = None) -> AsyncIterator[None]:
        """`hold`, then `release`."""
        await self.hold(rows, loan)
        try:
            yield
        finally:
            self.release(rows)

    def in_use(self) -> AbstractAsyncContextManager[None]:
        """A claim of no rows, which keeps nobody waiting: the push's files stay open, even if it ends."""
        return self.claim(RowRange(0, 0))

    async def hold(self, rows: RowRange, loan: RowRange | None = None) -> None:
        """Waits until nobody else writes any of these rows, then holds them; `loan` is the asker's own."""
        while any(claim is not loan and claim.overlaps(rows) for claim in self._claims):
            await self._released.wait()
        self._claims.append(rows)

    def lend(self, rows: RowRange) -> bool:
        """Holds rows for one caller until `take_back`, or until all are there; False: somebody has some."""
        if self.state is not PushState.OPEN or any(claim.overlaps(rows) for claim in self._claims):
            return False
        self._claims.append(rows)
        self._loans.append(rows)
        return True

    def take_back(self, loan: RowRange) -> None:
        """Ends a loan; one that has ended is no error."""
        self._loans = [each for each in self._loans if each is not loan]
        self.release(loan)

    def _take_all_back(self) -> None:
        for loan in self._loans:
            self.take_back(loan)

    def is_lent(self, loan: RowRange) -> bool:
        return any(each is loan for each in self._loans)

    def release(self, rows: RowRange) -> None:
        """Lets go what `hold` was given: by identity, as a message may hold the very rows of its loan."""
        self._claims = [each for each in self._claims if each is not rows]
        self._released.fire()

    async def idle(self) -> None:
        """Until nobody needs its files."""
        while self._claims:
            await self._released.wait()
