"""Health as gRPC asks for it: at the service's own addresses, and at one where no stream can starve it."""

# ruff: noqa: N802 - the protocol's method names

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from nearkin_service import listening, wire
from nearkin_service.access import Gate
from nearkin_service.catalogue import Catalogue, Signal
from nearkin_service.errors import NearkinError, NotFoundError
from nearkin_service.values import PushState

RUN_HEALTH = "run/"
"""`run/NAME` is the name of a run's health: SERVING, or NOT_SERVING while its latest push has failed."""
_CHECK = "/grpc.health.v1.Health/Check"
_THREADS = 4
_LAST_REPLIES_SECONDS = 1.0
_WELL = health_pb2.HealthCheckResponse


class RunHealth(health.aio.HealthServicer):  # type: ignore[misc]
    """The standard health service on the event loop, which also knows runs."""

    def __init__(self, catalogue: Catalogue) -> None:
        super().__init__()
        self._catalogue = catalogue
        self._changed = Signal()
        self._draining = False

    async def Check(self, request: Any, context: Any) -> Any:
        if not request.service.startswith(RUN_HEALTH):
            return await super().Check(request, context)
        try:
            return _of_run(self._catalogue, request.service)
        except NotFoundError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))

    async def Watch(self, request: Any, context: Any) -> None:
        """Ends once it has said that the service drains: the standard one would hold up its end.

        That one also forgets every watcher of a name as soon as one of them leaves.
        """
        told = None
        while True:
            status = self._server_status.get(request.service, _WELL.SERVICE_UNKNOWN)
            if status != told:
                told = status
                await context.write(_WELL(status=status))
            elif self._draining:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the service is stopping")
            else:
                await self._changed.wait()

    async def set(self, service: str, status: Any) -> None:
        await super().set(service, status)
        self._changed.fire()

    async def enter_graceful_shutdown(self) -> None:
        await super().enter_graceful_shutdown()
        self._draining = True
        self._changed.fire()


class _OnThreads(health.HealthServicer):  # type: ignore[misc]
    """The same on threads."""

    def __init__(self, catalogue: Catalogue, gate: Gate, trouble: Callable[[], str]) -> None:
        super().__init__()
        self._catalogue = catalogue
        self._gate = gate
        self._trouble = trouble

    def Check(self, request: Any, context: Any) -> Any:
        try:
            self._gate.require_health(self._gate.caller(_CHECK, context), request, context)
            if request.service.startswith(RUN_HEALTH):
                return _of_run(self._catalogue, request.service)
        except NearkinError as error:
            context.abort_with_status(wire.to_status(error))
        if self._trouble():
            return _WELL(status=_WELL.NOT_SERVING)
        return super().Check(request, context)


class HealthThreads:
    """A server of its own. NOT_SERVING until `set_serving`, while it drains, and where `trouble` says so."""

    def __init__(
        self,
        address: str,
        credentials: grpc.ServerCredentials | None,
        *,
        names: Iterable[str],
        catalogue: Catalogue,
        gate: Gate,
        trouble: Callable[[], str],
    ) -> None:
        """Listens. ValueError: the address is taken."""
        self._health = _OnThreads(catalogue, gate, trouble)
        self._names = tuple(names)
        self._set(_WELL.NOT_SERVING)
        workers = ThreadPoolExecutor(_THREADS, "nearkin-health")
        self._server = grpc.server(workers, options=(("grpc.so_reuseport", 0),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.address = listening.bind(self._server, address, credentials)
        self._server.start()

    def set_serving(self) -> None:
        self._set(_WELL.SERVING)

    def _set(self, status: Any) -> None:
        for name in self._names:
            self._health.set(name, status)

    def drain(self) -> None:
        """NOT_SERVING from now on."""
        self._health.enter_graceful_shutdown()

    def close(self) -> None:
        self._server.stop(_LAST_REPLIES_SECONDS).wait()
        if listening.is_unix(self.address):
            listening.socket_path(self.address).unlink(missing_ok=True)


def _of_run(catalogue: Catalogue, name: str) -> Any:
    """NotFoundError: there is no such run."""
    run = catalogue.runs.get(name.removeprefix(RUN_HEALTH))
    if run is None:
        raise NotFoundError("there is no such run")
    latest = run.latest_push
    failed = latest is not None and latest.state is PushState.FAILED
    return _WELL(status=_WELL.NOT_SERVING if failed else _WELL.SERVING)
