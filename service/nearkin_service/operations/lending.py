"""Rows lent to callers on this host, who write them where they are kept: no byte crosses a socket.

A loan keeps everybody else away from its rows. It ends with its last row, with the stream that uses it, or a
while after that one broke: a caller who died is soon in nobody's way, one whose connection was cut goes on.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from nearkin_service.catalogue import Catalogue, Push
from nearkin_service.errors import InvalidArgumentError
from nearkin_service.ranges import RowRange

log = logging.getLogger("nearkin.push")

UNUSED_SECONDS = 2.0


class Loan:
    """One caller's rows."""

    def __init__(self, push: Push, rows: RowRange) -> None:
        self.name = secrets.token_hex(16)
        self.push = push
        self.rows = rows
        self.streams = 0
        self.used = asyncio.get_running_loop().time()


class Lending:
    """The loans of all pushes. Lives on the event loop."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._loans: dict[str, Loan] = {}

    def offer(self, push_id: str, rows: RowRange) -> Loan | None:
        """Lends rows of an open push; None where somebody else writes some of them, or has them."""
        push = self._catalogue.push(push_id)
        if not push.lend(rows):
            log.info("push %s: rows %d..%d are not lent, they are in use", push_id, rows.start, rows.stop - 1)
            return None
        loan = Loan(push, rows)
        self._loans[loan.name] = loan
        self._look_again(loan, UNUSED_SECONDS)
        return loan

    @contextmanager
    def using(self, name: str, push_id: str) -> Iterator[Loan]:
        """Keeps a loan for one stream. InvalidArgumentError: there is none of this name and push."""
        loan = self._loans.get(name)
        if loan is None or loan.push.push_id != push_id:
            raise InvalidArgumentError("loan", "no such loan of this push, or not any more; send payloads")
        loan.streams += 1
        try:
            yield loan
            loan.push.take_back(loan.rows)
        finally:
            loan.streams -= 1
            loan.used = asyncio.get_running_loop().time()

    def _look_again(self, loan: Loan, seconds: float) -> None:
        asyncio.get_running_loop().call_later(seconds, self._look, loan)

    def _look(self, loan: Loan) -> None:
        left = loan.used + UNUSED_SECONDS - asyncio.get_running_loop().time()
        if loan.streams or left > 0:
            self._look_again(loan, max(left, UNUSED_SECONDS / 10))
            return
        loan.push.take_back(loan.rows)
        del self._loans[loan.name]
