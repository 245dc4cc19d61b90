"""WatchRun."""

# ruff: noqa: N802 - the protocol's method names

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

from nearkin.v1 import neighbours_pb2 as pb

from nearkin_service.operations import Administering
from nearkin_service.values import RunRemoved
from nearkin_service.wire import convert
from nearkin_service.wire.handlers import Context


class WatchMethods:
    """The RPC that streams events."""

    def __init__(self, administering: Administering) -> None:
        self._administering = administering

    async def WatchRun(
        self, request: pb.WatchRunRequest, _context: Context
    ) -> AsyncGenerator[pb.RunEvent, None]:
        """A snapshot first, as soon as the run exists; another one wherever events had to be left out."""
        with self._administering.subscribe(request.run) as subscription:
            present = self._administering.find_run(request.run)
            if present is not None:
                yield convert.run_event(present, time.time())
            while True:
                event = await subscription.next()
                known, present = present is not None, self._administering.find_run(request.run)
                if present is not None and (event is None or not known):
                    yield convert.run_event(present, time.time())
                elif event is not None:
                    yield convert.run_event(event, time.time())
                if isinstance(event, RunRemoved):
                    present = None
