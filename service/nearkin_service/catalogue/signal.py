"""Waiting for "something changed": whoever waits looks again and waits again if it was not for them."""

from __future__ import annotations

import asyncio


class Signal:
    """Wakes everyone who waits when it fires; remembers nothing."""

    def __init__(self) -> None:
        self._next: asyncio.Event = asyncio.Event()

    def fire(self) -> None:
        fired, self._next = self._next, asyncio.Event()
        fired.set()

    async def wait(self) -> None:
        """Until the next `fire`."""
        await self._next.wait()
