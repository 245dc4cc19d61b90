"""What all operations share: configuration, catalogue, data directory, and threads for slow work."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from nearkin_service.catalogue import Catalogue
from nearkin_service.config import ServiceConfig
from nearkin_service.engines.contract import (
    BuildMonitor,
    BuildRequest,
    BuiltTable,
    EngineDescription,
    KeyName,
    LocationOptions,
    Parent,
    Searcher,
)
from nearkin_service.errors import InvalidArgumentError, NearkinError, UnavailableError, is_momentary
from nearkin_service.metrics import Metrics
from nearkin_service.operations.pacing import Pacing
from nearkin_service.store import DataDirectory, PushFiles

log = logging.getLogger("nearkin.service")

P = ParamSpec("P")
T = TypeVar("T")


class Engines(Protocol):
    """What operations need of the engines; the package `nearkin_service.engines` is one."""

    def build_table(
        self, rows_NR: NDArray[Any], request: BuildRequest, monitor: BuildMonitor, /
    ) -> BuiltTable: ...

    def update_table(
        self, rows_NR: NDArray[Any], request: BuildRequest, parent: Parent, monitor: BuildMonitor, /
    ) -> BuiltTable: ...

    def open_searcher(
        self,
        rows_NR: NDArray[Any],
        row_shape: tuple[int, ...],
        key: KeyName,
        absent: NDArray[np.int64],
        device: str,
        /,
        *,
        qaconv: LocationOptions,
    ) -> Searcher: ...

    def describe_engines(self) -> Sequence[EngineDescription]: ...


def threads(count: int, name: str, initializer: Callable[[], None] | None = None) -> ThreadPoolExecutor:
    """Threads that are all there from the beginning.

    Left to itself a pool makes one with the call that needs it: where there can be none, that call is
    refused, and done all the same once another call has a thread.
    """
    pool, all_there = ThreadPoolExecutor(count, name, initializer), threading.Barrier(count + 1)
    try:
        for _ in range(count):
            pool.submit(all_there.wait)
    except RuntimeError:
        all_there.abort()
        pool.shutdown(wait=False)
        raise
    all_there.wait()
    return pool


class Core:
    """Shared by all operations of one service."""

    def __init__(
        self, config: ServiceConfig, directory: DataDirectory, engines: Engines, device: str
    ) -> None:
        self.config = config
        self.directory = directory
        self.engines = engines
        self.device = device
        self.known_engines = tuple(engines.describe_engines())
        self.require_engine(config.engine)
        self.catalogue = Catalogue()
        self.metrics = Metrics()
        self.pacing = Pacing()
        self.files: dict[str, PushFiles] = {}
        self.draining = self.ending = False
        self._io = threads(config.io_threads, "nearkin-io")
        self._background = threads(1, "nearkin-background")
        self._compute = threads(2, "nearkin-compute")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def require_engine(self, name: str) -> None:
        """InvalidArgumentError: no engine of this name can be used here."""
        known = {engine.name: engine for engine in self.known_engines}
        if name == "auto" or (name in known and known[name].available):
            return
        why = (
            f"is not available here: {known[name].reason}"
            if name in known
            else "is no engine of this service"
        )
        usable = ", ".join(["auto", *(engine.name for engine in known.values() if engine.available)])
        raise InvalidArgumentError("engine", f"{name[:80]!r} {why}; choose one of {usable}")

    async def io(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Short file work. Goes on to its end even if the caller is cancelled."""
        return await self._in(self._io, call, *args, **kwargs)

    async def background(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Long file work that nobody waits for, one thing after another."""
        return await self._in(self._background, call, *args, **kwargs)

    async def compute(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Searches and comparisons."""
        return await self._in(self._compute, call, *args, **kwargs)

    async def _in(
        self, pool: ThreadPoolExecutor, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        if self._closed:  # work of a caller who was given up goes no further than this
            raise UnavailableError("the service has stopped")
        return await asyncio.get_running_loop().run_in_executor(pool, lambda: call(*args, **kwargs))

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts work that outlives the call it came from; what goes wrong unasked is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None or isinstance(error, NearkinError):
            return
        if is_momentary(error):
            log.warning("background work came to nothing: %s", error)
        else:
            log.error("background work failed", exc_info=error)

    async def settle(self) -> None:
        """Until everything spawned so far is done."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    def refuse_when_ending(self) -> None:
        """UnavailableError: nothing at all is begun any more."""
        if self.ending:
            raise UnavailableError("the service is stopping; try again when it is back")

    def refuse_when_draining(self) -> None:
        if self.draining:
            raise UnavailableError("the service is stopping and takes nothing new; try again")

    def close(self) -> None:
        """Ends the threads, once they are done with what they do, and gives the data directory back."""
        self._closed = True
        for pool in (self._io, self._background, self._compute):
            pool.shutdown(wait=True, cancel_futures=True)
        for files in self.files.values():
            files.close()
        self.directory.close()
