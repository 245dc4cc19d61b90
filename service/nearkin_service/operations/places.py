"""So many at a time, of one run at most half of them; the others wait for their turn."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Places:
    """What each of them costs is bounded by their number, and no run can keep the others out."""

    def __init__(self, total: int) -> None:
        self._total = asyncio.Semaphore(total)
        self._of_one_run = max(1, total // 2)
        self._runs: dict[str, asyncio.Semaphore] = {}
        self._interested: Counter[str] = Counter()

    @asynccontextmanager
    async def of(self, run: str) -> AsyncIterator[None]:
        """Holds a place. First come, first served among those of one run."""
        mine = self._runs.setdefault(run, asyncio.Semaphore(self._of_one_run))
        self._interested[run] += 1
        try:
            async with mine, self._total:
                yield
        finally:
            self._interested[run] -= 1
            if not self._interested[run]:
                del self._interested[run], self._runs[run]
