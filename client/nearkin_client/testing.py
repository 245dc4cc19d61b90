"""A real service for your own tests, on a temporary socket and in a temporary directory.

    # conftest.py
    pytest_plugins = ["nearkin_client.testing"]

    # test_training.py
    def test_table(nearkin):
        nearkin.push(rows, epoch=0, k=5)
        assert nearkin.table(epoch=0).k == 5

Without pytest's fixtures, or for a service that a test may stop and kill:

    with neighbour_service() as service:
        client = NeighbourClient(service.address, run="mine")
        service.restart()

Needs `nearkin-service[cpu]`; where it is not installed, the fixtures skip the test and say so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nearkin_client.client import NeighbourClient
from nearkin_client.errors import ServiceNotInstalled
from nearkin_client.local import LocalService

_numbers = itertools.count(1)


@contextmanager
def neighbour_service(*options: str, listen: tuple[str, ...] = ()) -> Iterator[LocalService]:
    """A service of its own, with `.address`, `.restart()`, `.kill()` and `.start()`.

    Args:
        options: further arguments of nearkin-serve.
        listen: addresses beside its unix socket.

    Raises:
        ServiceNotInstalled: there is no `nearkin-serve` here.
    """
    with LocalService(options=options, listen=listen) as service:
        yield service


@pytest.fixture(scope="session")
def nearkin_server() -> Iterator[LocalService]:
    """One service for the whole test session; give each test a run name of its own."""
    try:
        service = LocalService().start()
    except ServiceNotInstalled as error:
        pytest.skip(str(error))
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture
def nearkin(nearkin_server: LocalService) -> Iterator[NeighbourClient]:
    """A client of `nearkin_server` on a run that no other test uses."""
    with NeighbourClient(nearkin_server.address, run=f"test-{next(_numbers)}") as client:
        yield client
