"""Services that are started again while somebody pushes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from nearkin.v1 import bulk
from nearkin_client.local import LocalService
from nearkin_client.shared import LentRows
from nearkin_client.testing import neighbour_service

from tests.ports import free_port


@contextmanager
def service_with_port() -> Iterator[LocalService]:
    """One on a unix socket and on a port, which it keeps."""
    with neighbour_service(listen=(f"127.0.0.1:{free_port()}",)) as started:
        yield started


def before_the_tenth_piece(act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that are written in place."""
    pieces, write = itertools.count(), LentRows.write

    def acting(self: LentRows, start: int, stop: int) -> bulk.WriteRows:
        if next(pieces) == 9:
            act()
        return write(self, start, stop)

    monkeypatch.setattr(LentRows, "write", acting)


def start_again(service: LocalService) -> None:
    """After a death without a word."""
    service.kill()
    service.start()
