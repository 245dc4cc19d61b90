"""Events of runs for whoever watches. A watcher that falls behind loses its place, never anyone's time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from nearkin_service.errors import UnavailableError
from nearkin_service.values import RunEvent

_BACKLOG = 1024


class Subscription:
    """One watcher's queue. After an overflow `next` returns None once: look up what happened in between."""

    def __init__(self) -> None:
        self._events: deque[RunEvent] = deque()
        self._overflowed = False
        self._closed = False
        self._filled = asyncio.Event()

    def put(self, event: RunEvent) -> None:
        if len(self._events) >= _BACKLOG:
            self._events.clear()
            self._overflowed = True
        self._events.append(event)
        self._filled.set()

    def close(self) -> None:
        """Nothing more will come; `next` says so."""
        self._closed = True
        self._filled.set()

    async def next(self) -> RunEvent | None:
        """The next event; None: some were dropped, look at the present state instead.

        UnavailableError: the service is stopping.
        """
        await self._filled.wait()
        if self._closed:
            raise _stopping()
        if self._overflowed:
            self._events.clear()
            self._overflowed = False
            self._filled.clear()
            return None
        event = self._events.popleft()
        if not self._events:
            self._filled.clear()
        return event


class EventHub:
    """Who watches which run."""

    def __init__(self) -> None:
        self._subscriptions: dict[str, set[Subscription]] = {}
        self._closed = False

    def publish(self, run: str, event: RunEvent) -> None:
        for subscription in self._subscriptions.get(run, ()):
            subscription.put(event)

    def close(self) -> None:
        """Tells every watcher that the service is stopping, and who comes from now on."""
        self._closed = True
        for watchers in self._subscriptions.values():
            for subscription in watchers:
                subscription.close()

    @contextmanager
    def subscribe(self, run: str) -> Iterator[Subscription]:
        """UnavailableError: the service is stopping."""
        if self._closed:
            raise _stopping()
        subscription = Subscription()
        watchers = self._subscriptions.setdefault(run, set())
        watchers.add(subscription)
        try:
            yield subscription
        finally:
            watchers.discard(subscription)
            if not watchers and self._subscriptions.get(run) is watchers:
                del self._subscriptions[run]


def _stopping() -> UnavailableError:
    return UnavailableError("the service is stopping; watch again once it is back")
