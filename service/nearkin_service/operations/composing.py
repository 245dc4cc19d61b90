"""Pushes of changed rows only: what is not sent is taken from an earlier generation."""

from __future__ import annotations

from nearkin_service.catalogue import Push
from nearkin_service.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from nearkin_service.operations.core import Core
from nearkin_service.ranges import RowRange, RowSet
from nearkin_service.store import PushFiles
from nearkin_service.values import EmbeddingsState, Generation, PushSpec, PushState


class Composing:
    """Puts the rows of a base generation where a push has none."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def base(self, spec: PushSpec) -> Generation:
        """FailedPreconditionError: it is gone. InvalidArgumentError: its rows are of another kind."""
        run = self._core.catalogue.runs.get(spec.run)
        base = run.generations.get(spec.base_generation) if run else None
        if base is None or not base.has_embeddings:
            raise _gone(spec)
        for name in ("num_classes", "row_shape", "dtype"):
            theirs, ours = getattr(base.spec, name), getattr(spec, name)
            if theirs != ours:
                raise InvalidArgumentError("base_generation", f"its {name} is {theirs}, not {ours}")
        return base

    async def compose(self, push: Push) -> None:
        """Takes every missing row from the base, checked; a class that is absent there stays absent.

        FailedPreconditionError: the base's embeddings are gone. DataLossError: they are damaged.
        """
        if not push.spec.base_generation:
            return
        async with push.claim(RowRange(0, push.spec.num_classes)):
            missing = await self._core.io(lambda: push.missing)
            if push.state is not PushState.OPEN or not len(missing):
                return
            base, files = self.base(push.spec), self._core.files[push.push_id]
            try:
                present, absent = await self._core.io(self._copy, base, files, missing)
            except (NotFoundError, FileNotFoundError):  # while it was read
                raise _gone(push.spec) from None
            stored = await self._core.io(push.stored.union, present)
            await declare(self._core, push, absent, stored)

    def _copy(self, base: Generation, files: PushFiles, missing: RowSet) -> tuple[RowSet, RowSet]:
        """Copies the rows of `missing` but for those absent in the base: which were which."""
        directory = self._core.directory
        rows = directory.open_rows(base)  # open from here on: whatever retention does, it can be read
        try:
            if directory.verify_rows(base) is EmbeddingsState.LOST:
                raise DataLossError(f"base_generation: the embeddings of {base.number} are damaged")
            present = missing.minus(RowSet.from_ids(directory.absent(base)))
            absent = missing.minus(present)
            files.note_absent(absent)
            files.compose(rows, present)
        finally:
            rows.close()
        return present, absent


def _gone(spec: PushSpec) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"base_generation: generation {spec.base_generation} of run {spec.run!r} does not exist or has no "
        "embeddings any more; push every row"
    )


async def declare(core: Core, push: Push, fresh: RowSet, stored: RowSet | None = None) -> None:
    """Adds to what is absent, counted on another thread: there may be millions of ranges.

    `stored`: what is there from now on, from one who holds a claim on every row.
    """
    while True:
        known, there = push.absent, push.stored if stored is None else stored
        absent = await core.io(known.union, fresh)
        both = await core.io(there.overlap, absent)
        if push.absent is known:
            break
    push.stored = push.stored if stored is None else stored
    push.declare(absent, both, there)
