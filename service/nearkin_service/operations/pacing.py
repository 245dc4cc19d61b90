"""Tables and builds give way to rows.

A push holds up a whole training job, a table only its reader, and many readers come at once. While rows
arrive, tables together get a sixteenth of as many bytes, but never less than lets every reader get on, and
each thread of a build rests seven times as long as it works.
"""

from __future__ import annotations

import asyncio
import threading
import time

RECENT_SECONDS = 0.5
"""Rows are taken to be arriving for so long after each message, and after a push was begun or joined."""
SHARE = 0.0625
"""Bytes of tables for each byte of rows."""
LEAST_BYTES_PER_SECOND = 32 << 20
_MOST_SAVED_BYTES = 8 << 20
_PAUSE_SECONDS = 0.01


class Pacing:
    """Of one service. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._async_turn = asyncio.Lock()
        self._arrived = float("-inf")
        self._counted = 0.0
        self._saved = 0.0

    def rows_arrived(self, nbytes: int) -> None:
        """So many bytes of rows were stored or compared."""
        with self._lock:
            self._arrived = time.monotonic()
            self._save(self._arrived, nbytes * SHARE)

    def rest(self, since: float, seconds: float, wake: threading.Event) -> None:
        """Of a build that began `since`, with all its rows there: so long at most, while others arrive."""
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until and not wake.is_set():
            with self._lock:
                arriving = self._arrived > since and now - self._arrived <= RECENT_SECONDS
            if not arriving:
                return
            wake.wait(_PAUSE_SECONDS)

    def wait(self, nbytes: int) -> None:
        """Until a block of a table may go. One caller after another."""
        with self._turn:
            while not self._may_go(nbytes):
                time.sleep(_PAUSE_SECONDS)

    async def turn(self, nbytes: int) -> None:
        """The same on the event loop."""
        async with self._async_turn:
            while not self._may_go(nbytes):
                await asyncio.sleep(_PAUSE_SECONDS)

    def _may_go(self, nbytes: int) -> bool:
        now = time.monotonic()
        with self._lock:
            if now - self._arrived > RECENT_SECONDS:
                self._saved = 0.0
                return True
            self._save(now, 0.0)
            if self._saved < 0:
                return False
            self._saved -= nbytes
            return True

    def _save(self, now: float, nbytes: float) -> None:
        trickle = (now - self._counted) * LEAST_BYTES_PER_SECOND
        self._counted = now
        self._saved = min(self._saved + nbytes + trickle, _MOST_SAVED_BYTES)
