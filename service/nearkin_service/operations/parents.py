"""The generation that a build can start from: what did not change since need not be computed again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from nearkin_service.catalogue import Run
from nearkin_service.engines.contract import Parent
from nearkin_service.errors import NearkinError
from nearkin_service.store import DataDirectory
from nearkin_service.values import Generation, PushSpec

log = logging.getLogger("nearkin.build")

_SAME = ("num_classes", "row_shape", "dtype", "k", "key")


def parent_of(run: Run, spec: PushSpec) -> Generation | None:
    """The base that the push names, else the newest generation, whose exact table and rows are like these."""
    if spec.key == "qaconv":
        return None
    named = run.generations.get(spec.base_generation)
    candidates = [named] if named else [*reversed(run.generations.values())]
    return next((each for each in candidates if _suits(each, spec)), None)


def _suits(generation: Generation, spec: PushSpec) -> bool:
    alike = all(getattr(generation.spec, name) == getattr(spec, name) for name in _SAME)
    return alike and generation.exact and generation.has_embeddings


@contextmanager
def opened(directory: DataDirectory, generation: Generation) -> Iterator[Parent | None]:
    """Its rows and its verified table; None, and the log says why, if retention or damage took them.

    Rows are not verified: one that differs from what is pushed now counts as changed, whatever made it so.
    """
    with ExitStack() as held:
        try:
            rows = directory.open_rows(generation)
            held.callback(rows.close)
            parent = Parent(
                rows.map(),
                *directory.verified_table(generation),
                directory.absent(generation),
                directory.reserve(generation),
            )
        except (NearkinError, OSError) as trouble:
            log.warning(
                "run %s: not built from generation %d: %s", generation.run, generation.number, trouble
            )
            parent = None
        yield parent
