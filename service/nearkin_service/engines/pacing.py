"""How long a block of work should be, and when to speak about it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from nearkin_service.engines.contract import BuildMonitor

_BLOCK_SECONDS = 0.3  # a cancelled build stops within a second, a block's start-up costs stay small
_BETWEEN_REPORTS = 0.3


class Silence:
    """A monitor that nobody listens to; for queries and tests."""

    def progress(self, stage: str, rows_done: int, rows_total: int) -> None:
        """Nobody asks."""

    def check(self) -> None:
        """Nobody cancels."""


class Pace:
    """Asks the monitor after every block whether to go on, and reports a few times a second. Any thread."""

    def __init__(self, monitor: BuildMonitor, stage: str, rows_total: int) -> None:
        self.monitor = monitor
        self._stage = stage
        self._total = rows_total
        self._reporting = threading.Lock()
        self._reported, self._told = time.monotonic(), 0
        monitor.check()
        monitor.progress(stage, 0, rows_total)

    def done(self, rows: int) -> None:
        """So many rows of this stage are done. Raises `BuildCancelled` if the build must stop."""
        self.monitor.check()
        with self._reporting:
            now = time.monotonic()
            due = rows >= self._total or now - self._reported >= _BETWEEN_REPORTS
            if due and rows >= self._told:
                self._reported, self._told = now, rows
                self.monitor.progress(self._stage, min(rows, self._total), self._total)


class BlockSize:
    """Rows of the next block, from how long the last one took."""

    def __init__(self, first: int, most: int) -> None:
        self.rows = max(1, min(first, most))
        self._most = max(1, most)
        self._began = time.monotonic()

    def start(self) -> None:
        """A block begins."""
        self._began = time.monotonic()

    def finish(self) -> None:
        """A block ended: aim at the wanted duration, at most doubling or halving."""
        took = max(time.monotonic() - self._began, 1e-6)
        wanted = int(self.rows * min(2.0, max(0.5, _BLOCK_SECONDS / took)))
        self.rows = max(1, min(wanted, self._most))


def blocks(count: int, size: BlockSize, pace: Pace, before: int = 0) -> Iterator[slice]:
    """Consecutive slices of `count`, each a fraction of a second's work; the pace is told after each."""
    done = 0
    while done < count:
        size.start()
        some = slice(done, min(count, done + size.rows))
        yield some
        done = some.stop
        pace.done(before + done)
        size.finish()
