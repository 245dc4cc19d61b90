"""From a closed push to a published generation: one build at a time, runs taking turns."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from nearkin import tracing
from numpy.typing import NDArray

from nearkin_service import faults
from nearkin_service.catalogue import Push, Run, sweep
from nearkin_service.engines.contract import BuildCancelled, BuildRequest, BuiltTable
from nearkin_service.errors import DataLossError, NotFoundError, is_momentary, lacking
from nearkin_service.operations.core import Core, threads
from nearkin_service.operations.parents import opened, parent_of
from nearkin_service.operations.searching import Searching
from nearkin_service.store import Finished
from nearkin_service.values import BuildProgress, EmbeddingsState, Generation, PushState

log = logging.getLogger("nearkin.build")

_KEPT_OUTCOMES = 16
_NICENESS = 5
"""Of builds: about a third of a core that others want as well, and all of one that nobody wants."""
_REST = 7.0
"""Seconds for each of processor time that a thread of a build has used, while other rows arrive."""


class _Monitor:
    """Between the threads of a build and the event loop."""

    def __init__(self, core: Core, push: Push) -> None:
        self._core = core
        self._push = push
        self._loop = asyncio.get_running_loop()
        self._stage, self._stage_began = "", 0.0
        self._began = time.monotonic()
        self._mine = threading.local()
        self.cancelled = threading.Event()
        self.stopping = False

    def progress(self, stage: str, rows_done: int, rows_total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._stage_began = stage, now
        rate = rows_done / (now - self._stage_began) if now > self._stage_began else 0.0
        left = (rows_total - rows_done) / rate if rate > 0 else -1.0
        event = BuildProgress(
            self._push.push_id, self._push.spec.epoch, stage, rows_done, rows_total, rate, left
        )
        self._loop.call_soon_threadsafe(self._core.catalogue.events.publish, self._push.spec.run, event)

    def begin(self) -> None:
        """On a thread that lived before this build."""
        self._mine.checked = time.thread_time()

    def check(self) -> None:
        worked = time.thread_time() - getattr(self._mine, "checked", 0.0)
        limit = self._push.spec.build_timeout
        left = math.inf if limit is None else self._began + limit - time.monotonic()
        self._core.pacing.rest(self._began, min(_REST * worked, left), self.cancelled)
        self._mine.checked = time.thread_time()
        if self.cancelled.is_set():
            raise BuildCancelled("cancelled")
        if limit is not None and time.monotonic() - self._began > limit:
            raise BuildCancelled(f"the build took longer than its build_timeout of {limit:g} s")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began


def _give_way() -> None:
    """Of the calling thread and those it will start: where cores are short, arriving rows come first."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _why(error: Exception) -> str:
    """What a caller is told of a build that broke."""
    if isinstance(error, DataLossError):
        return f"DATA_LOSS: {error}"
    if (limit := lacking(error)) is not None:
        return f"{limit}; the table could not be made; push the epoch again"
    return f"the build failed: {type(error).__name__}: {error}"


class Builds:
    """The build queue, and how pushes end."""

    def __init__(self, core: Core, searching: Searching) -> None:
        self._core = core
        self._searching = searching
        self._waiting: OrderedDict[str, deque[tuple[Push, Any]]] = OrderedDict()  # and the span that asked
        self._running: dict[str, _Monitor] = {}
        self._queued = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threads(1, "nearkin-build", _give_way)
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._worker = asyncio.get_running_loop().create_task(self._work())

    def enqueue(self, push: Push) -> None:
        self._waiting.setdefault(push.spec.run, deque()).append((push, tracing.here()))
        self._core.metrics.queued_builds.inc()
        self._idle.clear()
        self._queued.set()

    @property
    def idle(self) -> asyncio.Event:
        """Set while nothing is being built or waits for it."""
        return self._idle

    async def stop(self) -> None:
        """Ends the build that runs; it starts anew with the next service on this data directory."""
        if self._worker is not None:
            self._worker.cancel()
        for monitor in self._running.values():
            monitor.stopping = True
            monitor.cancelled.set()
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)

    # ------------------------------------------------------------------------------------------- the queue

    async def _work(self) -> None:
        while True:
            queued = self._next()
            if queued is None:
                self._idle.set()
                self._queued.clear()
                await self._queued.wait()
            elif queued[0].state is PushState.BUILDING:
                await self._traced_build(*queued)

    def _next(self) -> tuple[Push, Any] | None:
        """The oldest push of the run whose turn it is."""
        if not self._waiting:
            return None
        run, pushes = self._waiting.popitem(last=False)
        queued = pushes.popleft()
        if pushes:
            self._waiting[run] = pushes
        self._core.metrics.queued_builds.dec()
        return queued

    async def _traced_build(self, push: Push, asked_by: Any) -> None:
        spec = push.spec
        with tracing.span("build", asked_by, run=spec.run, epoch=spec.epoch, push=push.push_id):
            async with push.in_use():
                await self._build(push)

    async def _build(self, push: Push) -> None:
        monitor = _Monitor(self._core, push)
        self._running[push.push_id] = monitor
        parent = parent_of(self._core.catalogue.run(push.spec.run), push.spec)
        self._core.spawn(self._flush_ahead(push))
        try:
            table = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._build_table, push, parent, monitor
            )
            await self._publish(push, table, monitor.seconds)
        except BuildCancelled as why:
            if not monitor.stopping:
                await self.end(push, PushState.FAILED, str(why))
        except ValueError as error:
            await self.end(push, PushState.FAILED, str(error))
        except Exception as error:
            if push.live and not is_momentary(error):  # those are no mistakes of ours, and said below
                log.exception("run %s epoch %d: the build failed", push.spec.run, push.spec.epoch)
            await self.end(push, PushState.FAILED, _why(error))
        finally:
            del self._running[push.push_id]

    def _build_table(self, push: Push, parent: Generation | None, monitor: _Monitor) -> BuiltTable:
        monitor.begin()
        faults.point("build.begun")
        spec, config = push.spec, self._core.config
        request = BuildRequest(
            row_shape=spec.row_shape,
            key=spec.key,
            k=spec.k,
            engine=config.engine if spec.engine in ("", "auto") else spec.engine,
            device=self._core.device,
            absent=push.absent.ids(),
            qaconv=spec.qaconv,
            target_recall=config.target_recall,
        )
        files = self._core.files[push.push_id]
        try:
            table = self._built(files.rows.map(), request, parent, monitor)
        except BuildCancelled:
            raise
        except Exception:
            files.require_undamaged(monitor.check)  # an engine cannot know that its input was damaged
            raise
        # Afterwards, so that damage done while the engine was reading is seen as well.
        files.require_undamaged(monitor.check)
        return table

    def _built(
        self, rows: NDArray[Any], request: BuildRequest, parent: Generation | None, monitor: _Monitor
    ) -> BuiltTable:
        if parent is None:
            return self._core.engines.build_table(rows, request, monitor)
        with opened(self._core.directory, parent) as found:
            if found is None:
                return self._core.engines.build_table(rows, request, monitor)
            return self._core.engines.update_table(rows, request, found, monitor)

    # -------------------------------------------------------------------------------------------- the end

    async def _publish(self, push: Push, table: BuiltTable, seconds: float) -> None:
        faults.point("build.done")
        if push.state is not PushState.BUILDING:
            return
        push.publishing = True
        core, run = self._core, self._core.catalogue.run(push.spec.run)
        finished = Finished(
            number=run.last_generation + 1,
            spec=push.spec,
            push_id=push.push_id,
            absent=await self._core.io(push.absent.ids),
            table=table,
            build_seconds=seconds,
            published=time.time(),
        )
        try:
            generation = await core.io(core.directory.publish, finished)
            self._searching.trust(generation)
            core.catalogue.publish(run, push, generation)
        finally:
            push.publishing = False
        self._tell(generation)
        core.spawn(self._close_files(push))
        core.spawn(self._tidy(run, generation))

    def _tell(self, generation: Generation) -> None:
        metrics = self._core.metrics
        metrics.generations.inc()
        metrics.build_seconds.labels("total").observe(generation.build_seconds)
        for stage, seconds in generation.stage_seconds.items():
            metrics.build_seconds.labels(stage).observe(seconds)
        log.info(
            "run %s epoch %d: generation %d published, engine %s on %s, %.2f s",
            generation.run,
            generation.epoch,
            generation.number,
            generation.engine,
            generation.device,
            generation.build_seconds,
        )

    async def end(self, push: Push, state: PushState, error: str) -> None:
        """A push comes to nothing: its rows go, its readers are told."""
        if not push.live:
            return
        self.drop(push, state, error)
        if state is PushState.FAILED:
            self._core.metrics.builds_failed.inc()
        log.info("run %s epoch %d: push %s %s %s", push.spec.run, push.spec.epoch, push.push_id, state, error)
        self._core.catalogue.push_changed(push)
        try:
            await self._core.io(self._core.directory.finish_push, push.spec.run, push.push_id, state, error)
        except OSError as trouble:  # a full disk; the next start finds the push as it was and tries again
            log.warning("run %s: the end of push %s is not on disk: %s", push.spec.run, push.push_id, trouble)
        await self._forget_old(push.spec.run)

    def drop(self, push: Push, state: PushState, error: str) -> None:
        """Ends a push without a word: stops its build, closes its files once nobody writes."""
        push.end(state, error)
        if push.push_id in self._running:
            self._running[push.push_id].cancelled.set()
        self._core.spawn(self._close_files(push))

    async def _forget_old(self, run: str) -> None:
        for push in self._core.catalogue.outlived(run, _KEPT_OUTCOMES):
            self._core.catalogue.forget_push(push)
            await self._core.io(self._core.directory.forget_push, run, push.push_id)

    async def _close_files(self, push: Push) -> None:
        await push.idle()
        files = self._core.files.pop(push.push_id, None)
        if files is not None:
            files.close()

    # ------------------------------------------------------------------------------------------- tidying

    async def _tidy(self, run: Run, generation: Generation) -> None:
        await self.sweep(run, generation)
        await self.flush(generation)

    async def _flush_ahead(self, push: Push) -> None:
        """Has the disk write the rows while the table is built, not while those of the next epoch come."""
        with suppress(OSError):  # the push has ended
            await self._core.background(self._core.directory.flush_rows, push.spec.run, push.push_id)

    async def flush(self, generation: Generation) -> None:
        """Waits for the disk to have the embeddings, and says so."""
        try:
            state = await self._core.background(self._core.directory.flush, generation)
        except (OSError, NotFoundError):
            return  # removed or dropped meanwhile
        current = self._core.catalogue.present(generation)
        if current is not None and current.embeddings is EmbeddingsState.FLUSHING:
            self._core.catalogue.replace(replace(current, embeddings=state))

    async def sweep(self, run: Run, newest: Generation) -> None:
        """Applies the newest push's retention. What is open stays readable until it is closed."""
        policy = self._core.config.retention(newest.spec.retention)
        due = sweep(list(run.generations.values()), policy)
        for generation in due.remove:
            self._core.catalogue.remove_generation(run, generation)
            self._searching.forget(generation)
        for generation in due.drop_embeddings:
            self._core.catalogue.replace(replace(generation, embeddings=EmbeddingsState.DROPPED))
            self._searching.forget(generation)
        if due.remove or due.drop_embeddings:
            faults.point("retention.decided")
        for generation in due.remove:
            await self._in_its_turn(run, self._core.directory.delete_generation, generation)
        for generation in due.drop_embeddings:
            await self._in_its_turn(run, self._core.directory.drop_embeddings, generation)

    async def _in_its_turn(
        self, run: Run, clear: Callable[[Generation], object], generation: Generation
    ) -> None:
        """Clears something away, unless the run goes first: another may have its name, and such a number."""

        def if_it_is_there() -> None:
            if self._core.catalogue.runs.get(run.name) is run:
                try:
                    clear(generation)
                except FileNotFoundError:
                    pass  # somebody has deleted it
                except OSError as trouble:
                    log.warning(
                        "run %s generation %d: not cleared away: %s", run.name, generation.number, trouble
                    )

        await self._core.background(if_it_is_there)
