"""Shared memory for pushes from this host: offered, used, and taken away when nobody uses it any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from nearkin_service.config import MIB
from nearkin_service.errors import InvalidArgumentError, LimitExceededError
from nearkin_service.operations.core import Core
from nearkin_service.store import Segment
from nearkin_service.values import PushSpec

log = logging.getLogger("nearkin.push")

PLACES = 8
"""Messages that find room in one segment at the same time."""
MAX_SHARED_BYTES = 1024 * MIB
"""All segments together; who comes after that sends payloads."""
IDLE_SECONDS = 30.0
_PAGE = 4096


class _Lent:
    """A segment that a caller has."""

    def __init__(self, segment: Segment, push_id: str) -> None:
        self.segment = segment
        self.push_id = push_id
        self.named = False  # in a message
        self.users = 0
        self.used = asyncio.get_running_loop().time()


class Sharing:
    """The segments of all callers. Lives on the event loop."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._lent: dict[str, _Lent] = {}
        self._offered_bytes = 0

    async def offer(self, push_id: str, spec: PushSpec) -> Segment | None:
        """A segment for one caller's rows of this push; None where there is no room for it."""
        place = max(self._core.config.chunk_bytes, spec.row_bytes)
        size = PLACES * (-(-place // _PAGE) * _PAGE + _PAGE)
        if self._offered_bytes + size > MAX_SHARED_BYTES:
            log.info("push %s: no shared memory, %d bytes are lent already", push_id, self._offered_bytes)
            return None
        self._offered_bytes += size
        try:
            segment = await self._core.io(self._core.directory.create_segment, size)
        except (LimitExceededError, OSError) as error:
            self._offered_bytes -= size
            log.warning("push %s: no shared memory: %s", push_id, error)
            return None
        self._core.segments[segment.name] = segment
        self._lent[segment.name] = _Lent(segment, push_id)
        asyncio.get_running_loop().call_later(IDLE_SECONDS, self._reap, segment.name)
        return segment

    @contextmanager
    def using(self, name: str, push_id: str) -> Iterator[Segment]:
        """Keeps a segment while a message is read from it. InvalidArgumentError: not lent for this push."""
        lent = self._lent.get(name)
        if lent is None or lent.push_id != push_id:
            raise InvalidArgumentError("segment", "no such segment of this push; send the rows as payload")
        if not lent.named:
            lent.segment.unlink()  # its caller has it open by now: should it die, nothing is left behind
        lent.named = True
        lent.users += 1
        try:
            yield lent.segment
        finally:
            lent.users -= 1
            lent.used = asyncio.get_running_loop().time()

    def _reap(self, name: str) -> None:
        """Closes a segment that nobody has used for a while, or comes back when that may be so."""
        loop, lent = asyncio.get_running_loop(), self._lent[name]
        left = lent.used + IDLE_SECONDS - loop.time()
        if lent.users or left > 0:
            loop.call_later(max(left, 0.1), self._reap, name)
            return
        del self._lent[name], self._core.segments[name]
        self._offered_bytes -= lent.segment.size
        lent.segment.close()
