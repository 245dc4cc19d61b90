"""Tickets: what may move over the bulk lane, and proof that gRPC has let its caller do so."""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from nearkin_service.ranges import RowRange
from nearkin_service.values import Generation

_NAME_BYTES, _SECRET_BYTES = 8, 24
_MOST = 4096
_SECONDS = 900.0
"""How long a ticket may lie unused."""


@dataclass(frozen=True, slots=True)
class RowsGrant:
    """Rows of one push, over any number of connections. `span`: what they belong to in a trace."""

    push_id: str
    span: Any = None


@dataclass(frozen=True, slots=True)
class TableGrant:
    """Rows of one generation's table, once."""

    generation: Generation
    rows: RowRange
    scores: bool
    span: Any = None


Grant = RowsGrant | TableGrant


@dataclass(frozen=True, slots=True)
class Ticket:
    """`shown` by the caller, `answer` by the service. Neither is ever logged."""

    shown: bytes = field(repr=False)
    answer: bytes = field(repr=False)
    grant: Grant


class Tickets:
    """All that are good at present. Any thread."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._good: dict[bytes, tuple[Ticket, float]] = {}  # by the first bytes; the longest unused first

    def issue(self, grant: Grant) -> Ticket:
        """A new ticket. Where there are too many, the one that was longest unused is none any more."""
        name = secrets.token_bytes(_NAME_BYTES)
        ticket = Ticket(name + secrets.token_bytes(_SECRET_BYTES), secrets.token_bytes(_SECRET_BYTES), grant)
        with self._lock:
            self._forget_old()
            if len(self._good) >= _MOST:
                del self._good[next(iter(self._good))]
            self._good[name] = (ticket, time.monotonic())
        return ticket

    def find(self, shown: bytes) -> Ticket | None:
        """The ticket that these bytes are; None: they are none."""
        with self._lock:
            return self._find(shown)

    def redeem(self, shown: bytes) -> Ticket | None:
        """The same; it is used then, and none any more if it was good once."""
        with self._lock:
            ticket = self._find(shown)
            if ticket is None:
                return None
            name = shown[:_NAME_BYTES]
            del self._good[name]
            if isinstance(ticket.grant, RowsGrant):
                self._good[name] = (ticket, time.monotonic())
        return ticket

    def _find(self, shown: bytes) -> Ticket | None:
        self._forget_old()
        ticket, _ = self._good.get(shown[:_NAME_BYTES], (None, 0.0))
        return ticket if ticket is not None and hmac.compare_digest(ticket.shown, shown) else None

    def _forget_old(self) -> None:
        until = time.monotonic() - self._seconds
        for name in list(self._good):
            if self._good[name][1] > until:
                return
            del self._good[name]
