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
"""For rows, and as many for tables."""
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


_Good = dict[bytes, tuple[Ticket, float]]


class Tickets:
    """All that are good at present. Any thread."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        # By the first bytes; the longest unused first. Apart, so that many readers push no writer out.
        self._rows: _Good = {}
        self._tables: _Good = {}

    def issue(self, grant: Grant) -> Ticket:
        """A new ticket. Where there are too many, the one that was longest unused is none any more."""
        name = secrets.token_bytes(_NAME_BYTES)
        ticket = Ticket(name + secrets.token_bytes(_SECRET_BYTES), secrets.token_bytes(_SECRET_BYTES), grant)
        good = self._rows if isinstance(grant, RowsGrant) else self._tables
        with self._lock:
            self._forget_old()
            if len(good) >= _MOST:
                del good[next(iter(good))]
            good[name] = (ticket, time.monotonic())
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
            self._tables.pop(name, None)
            if self._rows.pop(name, None) is not None:
                self._rows[name] = (ticket, time.monotonic())
        return ticket

    def _find(self, shown: bytes) -> Ticket | None:
        self._forget_old()
        name = shown[:_NAME_BYTES]
        ticket, _ = self._rows.get(name) or self._tables.get(name) or (None, 0.0)
        return ticket if ticket is not None and hmac.compare_digest(ticket.shown, shown) else None

    def _forget_old(self) -> None:
        until = time.monotonic() - self._seconds
        for good in (self._rows, self._tables):
            while good and next(iter(good.values()))[1] <= until:
                del good[next(iter(good))]
