"""One service: everything put together, started, watched over and stopped."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from nearkin import tracing

from nearkin_service import faults, listening, wire
from nearkin_service.access import Gate, TokenBook
from nearkin_service.catalogue import Push
from nearkin_service.config import MESSAGE_ROOM, MIB, ServiceConfig
from nearkin_service.health import HealthThreads, RunHealth
from nearkin_service.http import HealthServer
from nearkin_service.observing import RunMetrics
from nearkin_service.operations import Builds, Core, Engines, Lending, Pushing, Reading, Searching, Writing
from nearkin_service.store import DataDirectory
from nearkin_service.values import EmbeddingsState, PushState

log = logging.getLogger("nearkin.service")

_HEALTH_NAMES = ("", wire.SERVICE_NAME)
_BEAT_SECONDS, _DEAD_SECONDS = 1.0, 15.0
_LAST_REPLIES_SECONDS = 2.0
"""Of a stop that a build does not make: for whoever is being answered, and for the build to notice."""
_LAST_WORD_SECONDS = 0.2
"""In which every call is refused, before gRPC takes none."""
_LAST_THREADS_SECONDS = 2.0
"""After a stop's time, for threads that cannot be broken off: a flush, a search, a step of a build."""
_MOST_STREAMS = 16_384
"""Of one connection: more than readers may wait, so that no waiting reader ever keeps a push out."""


class NeighbourServer:
    """Lives in one event loop: `start`, then `stop` once."""

    def __init__(self, config: ServiceConfig, engines: Engines, device: str) -> None:
        """ValueError: the data directory is in use or of another format."""
        self._tokens = TokenBook(config.tokens, required=config.require_tokens)
        _check_doors(config, self._tokens)
        self._config = config
        self.core = Core(config, DataDirectory(config.data_dir), engines, device)
        self._health = RunHealth(self.core.catalogue)
        self._http: HealthServer | None = None
        self._health_threads: HealthThreads | None = None
        self._beat = time.monotonic()
        self._ready = False
        self.addresses: tuple[str, ...] = ()

    @property
    def http_address(self) -> str | None:
        return self._http.address if self._http else None

    @property
    def health_address(self) -> str | None:
        return self._health_threads.address if self._health_threads else None

    async def start(self) -> None:
        """Reads the data directory, listens, resumes builds. ValueError: an address is taken."""
        core = self.core
        self._searching = Searching(core)
        self._builds = Builds(core, self._searching)
        self._beating = asyncio.create_task(self._keep_beating())
        if self._config.http:
            self._http = self._serve_http(self._config.http)
        if self._config.health:
            self._health_threads = self._serve_health(self._config.health)
        core.catalogue.restore(await asyncio.to_thread(core.directory.recover))
        faults.point("start.recovered")
        pushing, reading = Pushing(core, self._builds), Reading(core)
        writing, lending = Writing(core, pushing), Lending(core.catalogue)
        self._lane = wire.BulkLane(
            core,
            pushing=pushing,
            writing=writing,
            lending=lending,
            reading=reading,
            count_error=self._count_error,
        )
        self._server = self._make_server(pushing, writing, lending, reading)
        self.addresses = self._bind()
        self._lane.open(self.addresses, tls=self._config.tls is not None)
        await self._server.start()
        faults.point("start.listening")
        self._builds.start()
        self._resume(pushing)
        for name in _HEALTH_NAMES:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        if self._health_threads:
            self._health_threads.set_serving()
        self._ready = True

    def _make_server(
        self, pushing: Pushing, writing: Writing, lending: Lending, reading: Reading
    ) -> grpc.aio.Server:
        core = self.core
        # Only who the gate lets in leaves a trace.
        interceptors = [self._make_gate(), *tracing.server_interceptors()]
        server = grpc.aio.server(interceptors=interceptors, options=_options(self._config))
        behaviours = wire.behaviours(
            core,
            self._builds,
            self._searching,
            pushing=pushing,
            writing=writing,
            lending=lending,
            reading=reading,
            lane=self._lane,
        )
        idle = self._config.limits.max_stream_idle_seconds
        server.add_generic_rpc_handlers(
            (wire.generic_handler(behaviours, self._count_error, idle, core.refuse_when_ending),)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._reflection = wire.Reflection((wire.SERVICE_NAME, health.SERVICE_NAME))
        server.add_generic_rpc_handlers(self._reflection.handlers())
        return server

    def _bind(self) -> tuple[str, ...]:
        credentials = self._credentials()
        return tuple(listening.bind(self._server, each, credentials) for each in self._config.listen)

    def _credentials(self) -> grpc.ServerCredentials | None:
        return self._config.tls.credentials() if self._config.tls else None

    def _make_gate(self) -> Gate:
        return Gate(
            self._tokens,
            self.core.catalogue.run_of_push,
            wire.refuser(self._count_error),
            unix_needs_token=self._config.require_tokens,
        )

    def _count_error(self, method: str, code: str) -> None:
        self.core.metrics.errors.labels(method, code).inc()

    def _resume(self, pushing: Pushing) -> None:
        """Goes on where the service before stopped: open pushes, builds, flushing, sweeping."""
        core = self.core
        for push in core.catalogue.open_pushes:
            core.files[push.push_id] = core.directory.open_push(push.spec, push.push_id)
            if push.state is PushState.BUILDING:
                self._builds.enqueue(push)
            else:
                core.spawn(pushing.resume(push))
            log.info(
                "run %s epoch %d: push %s goes on, %s",
                push.spec.run,
                push.spec.epoch,
                push.push_id,
                _how_far(push),
            )
        for run in core.catalogue.runs.values():
            for generation in run.generations.values():
                if generation.embeddings is EmbeddingsState.FLUSHING:
                    core.spawn(self._builds.flush(generation))
            if run.newest is not None:
                core.spawn(self._builds.sweep(run, run.newest))

    # --------------------------------------------------------------------------------------------- health

    def _serve_http(self, address: str) -> HealthServer:
        core = self.core
        core.metrics.open_pushes.set_function(lambda: len(core.catalogue.open_pushes))
        core.metrics.runs.set_function(lambda: len(core.catalogue.runs))
        core.metrics.quarantined.set_function(lambda: core.directory.quarantined)
        core.metrics.disk_free.set_function(core.directory.free_bytes)
        core.metrics.registry.register(RunMetrics(core.catalogue))
        try:
            return HealthServer(
                address,
                core.metrics.registry,
                live=self._trouble,
                ready=self._not_ready,
                may_read=self._may_read,
                tls=self._config.tls.context() if self._config.tls else None,
            )
        except OSError as error:
            raise ValueError(f"--http {address}: {error.strerror}") from error

    def _serve_health(self, address: str) -> HealthThreads:
        return HealthThreads(
            address,
            self._credentials(),
            names=_HEALTH_NAMES,
            catalogue=self.core.catalogue,
            gate=self._make_gate(),
            trouble=self._trouble,
        )

    def _may_read(self, token: str) -> bool:
        """Metrics name runs: with tokens in force they are for tokens that reach all of them."""
        found = self._tokens.find(token)
        return not self._tokens.in_force or (found is not None and not found.runs)

    async def _keep_beating(self) -> None:
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(_BEAT_SECONDS)

    def _trouble(self) -> str:
        silent = time.monotonic() - self._beat
        return f"the event loop has not moved for {silent:.0f} s" if silent > _DEAD_SECONDS else ""

    def _not_ready(self) -> str:
        return "" if self._ready else "starting or draining"

    # ------------------------------------------------------------------------------------------- stopping

    async def stop(self) -> bool:
        """Takes nothing new, lets builds and readers finish within `drain_seconds`, then ends.

        Whether all its threads have ended. If not, the data directory is not given back before they or this
        process have; killing them loses nothing.
        """
        self._ready = False
        core, seconds = self.core, self._config.drain_seconds
        deadline, last_replies = time.monotonic() + seconds, min(_LAST_REPLIES_SECONDS, seconds / 4)
        core.draining = True
        await self._health.enter_graceful_shutdown()
        if self._health_threads:
            self._health_threads.drain()
        core.catalogue.changed.fire()
        core.catalogue.events.close()
        self._reflection.close()
        built = await _within(deadline - last_replies, self._builds.idle.wait)
        # gRPC will cancel calls that wait to be begun: who is told before by name stays away.
        core.ending = True
        await asyncio.sleep(min(_LAST_WORD_SECONDS, seconds / 4))
        left = max(deadline - time.monotonic(), 0.0)
        last = deadline + _LAST_THREADS_SECONDS
        too_late = () if built else (_within(last, self._builds.stop),)
        await asyncio.gather(self._server.stop(left), self._lane.close(left), *too_late)
        ended = await _within(last, self._builds.stop)
        await _within(deadline, core.settle)
        self._beating.cancel()
        if self._http:
            await asyncio.to_thread(self._http.close)
        if self._health_threads:
            await asyncio.to_thread(self._health_threads.close)
        for address in self.addresses:  # before the next service may have them
            if listening.is_unix(address):
                listening.socket_path(address).unlink(missing_ok=True)
                listening.bulk_path(address).unlink(missing_ok=True)
        return ended and await _within(last, lambda: asyncio.to_thread(core.close))


async def _within(deadline: float, wait: Callable[[], object]) -> bool:
    """Waits, but not past the deadline; whether that was long enough."""
    try:
        async with asyncio.timeout(max(deadline - time.monotonic(), 0.1)):
            await wait()  # type: ignore[misc]
    except TimeoutError:
        log.warning("drain time is over; what is left goes on with the next start")
        return False
    return True


def _check_doors(config: ServiceConfig, tokens: TokenBook) -> None:
    """ValueError: an address is open to other machines although nobody said that it may be."""
    if config.tls is not None:
        config.tls.warn_if_out_of_date()
    asks = bool(config.tls and config.tls.asks_clients)
    doors = listening.Doors(config.tls is not None, asks, tokens.in_force, config.insecure)
    for address in filter(None, (*config.listen, config.health)):
        listening.check_address(address, doors)
    if config.http:
        try:
            listening.check_address(config.http, replace(doors, client_certificates=False))
        except ValueError as error:
            raise ValueError(f"--http {error}") from error
    log.info("callers over the network %s", "need a token" if tokens.in_force else "need no token")


def _how_far(push: Push) -> str:
    missing = push.missing_count
    return f"{missing} rows are missing" if missing else f"{push.state}"


def _options(config: ServiceConfig) -> list[tuple[str, int]]:
    """Large frames and buffers: bulk messages dominate, and header bytes never pay for small ones."""
    return [
        ("grpc.max_receive_message_length", config.limits.max_message_bytes + MESSAGE_ROOM),
        ("grpc.max_send_message_length", -1),
        ("grpc.http2.max_frame_size", 16 * MIB - 1),
        ("grpc.http2.write_buffer_size", 4 * MIB),
        # What waits here for its handler when a connection breaks has to be sent again, so it must not grow
        # with the line. 2 MiB fill 10 Gbit/s at 1.6 ms.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 2 * MIB),
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", _MOST_STREAMS),
        ("grpc.keepalive_time_ms", 60_000),  # finds callers that vanished without a word
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),  # any number: a reader may wait for hours
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
