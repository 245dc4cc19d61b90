"""The neighbour table of an epoch: every process pushes its rows, one per machine fetches for all of it.

    refresh(epoch)  begins this epoch's push, returns the table to train with
    settle()        waits until the service has this epoch's rows
    publish(epoch)  pushes and waits for the table; for the rows at the end of a job

Epoch e trains with the table of epoch e - staleness, never with another: a job that finds a newer one ready
does not take it, so that its result does not depend on how fast a service is. With staleness 0 `refresh`
waits for push, build and table. Above 0 the rows are pushed as they were, and the table fetched, by two
threads; they only speak to the service, and what processes say to each other stays on the main thread.

Legend: N classes, k neighbours, n rows of this process.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Literal, Self

import numpy as np
import torch
from nearkin_client import NeighbourClient, NeighbourTable
from nearkin_client.errors import AlreadyExists, FailedPrecondition, NotFound
from numpy.typing import NDArray

from nearkin_trainer.classes import ClassEmbeddings, Snapshot
from nearkin_trainer.distributed import World, fail_together, tell_all, tell_node
from nearkin_trainer.node import node_array, wait_for_node

logger = logging.getLogger("nearkin.trainer.neighbours")

Table = NDArray[np.int32]
BLOCK_BYTES = 64 * 2**20  # of rows pushed at a time while training goes on
ANOTHER_JOB = "Does another job use this run? Then give one of them another --run-name"


@dataclass(frozen=True)
class NeighbourConfig:
    """Which neighbours are asked for.

    Args:
        k: neighbours per class; at most the number of classes less one (more is cut down, and said).
        key: what the service compares: `flat` (whole maps), `pooled` (their means) or `qaconv` (location by
            location, among the nearest by `pooled`).
        engine: what builds the table; `auto` leaves it to the service.
        wire_dtype: what rows are sent as; `float16` or `bfloat16` halve the bytes.
        timeout: seconds to wait for a table.
    """

    k: int = 32
    key: Literal["flat", "pooled", "qaconv"] = "flat"
    engine: str = "auto"
    wire_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    timeout: float = 3600.0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1")
        if not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout} seconds must be more than 0")


class Neighbours:
    """This process's side of the exchange with the service; a context manager, because it has threads.

    Args:
        world: the job; all its processes call the same methods in the same order.
        client: of the job's run; closed after this.
        config: which neighbours are asked for.
        num_classes: N.
        staleness: by how many epochs the table may lag behind; 0 waits for each.

    Attributes:
        k: neighbours per class after cutting down.
        stall_seconds: how long this process has stood still so far: pushing, waiting.
        generation: number of the last table's generation, 0 before the first.
        table_epoch: the epoch whose rows that table compares, None before the first.
        pushes: by epoch, the id of the push that had our rows; a checkpoint keeps them, so that no table of
            another job is taken for ours.
    """

    def __init__(
        self,
        world: World,
        client: NeighbourClient,
        config: NeighbourConfig,
        num_classes: int,
        staleness: int = 0,
    ) -> None:
        self._world, self._client, self._config = world, client, config
        self.k = min(config.k, num_classes - 1)
        if self.k < config.k and world.leads:
            logger.info("k=%d is more than %d classes allow; using k=%d", config.k, num_classes, self.k)
        self.stall_seconds = 0.0
        self.generation = 0
        self.table_epoch: int | None = None
        self.pushes: dict[int, str] = {}
        self._table: Table | None = None
        self._staleness = staleness
        self._oldest = 0  # no epoch before this one has a table that we could train with
        self._pushing = ThreadPoolExecutor(1, "nearkin-push")
        self._reading = ThreadPoolExecutor(1, "nearkin-table")
        self._pushed: Future[str] | None = None  # the push begun last, until it is settled
        self._epoch = 0  # that it is of
        self._coming: dict[int, Future[NeighbourTable]] = {}  # by epoch; on the machine's first process

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not waited for: after a failure they may wait for rows that never come. Closing the client ends
        # them.
        for lane in (self._pushing, self._reading):
            lane.shutdown(wait=False, cancel_futures=True)

    def rewind(self, first_epoch: int) -> None:
        """Removes what an earlier attempt has left of this epoch and later ones; all processes wait.

        The tables of the epochs before it, which the next ones train with, are fetched again. Should the
        service not have them, this epoch waits for its own, as the first epoch of a job does.
        """
        found = None
        if self._world.leads:
            self._forget_from(first_epoch)
            found = str(self._oldest_kept(first_epoch))
        self._oldest = int(tell_all(self._world, found))
        self._table, self.table_epoch = None, None
        if self._world.leads_node:
            self._coming = {
                epoch: self._reading.submit(self._ask, epoch, None)
                for epoch in range(self._oldest, first_epoch)
            }

    def refuse_leftovers(self) -> None:
        """Makes sure that the run has no generations yet, and nobody pushes to it.

        Raises:
            ValueError: it has, or somebody does; on every process.
        """
        found = tell_all(self._world, self._existing() if self._world.leads else None)
        if found:
            raise ValueError(
                f"the service already has {found} of this run: choose another --run-name, "
                "continue with --resume, or replace them with --overwrite"
            )

    def refresh(self, epoch: int, embeddings: ClassEmbeddings) -> Table:
        """Begins this epoch's push and returns the table to train it with, int32 `[N, k]`.

        Waits only where that table is not there yet. All processes get the same one.

        Raises:
            NearkinError: this process could not push, or get the table for its machine.
            OtherProcessFailed: another one could not.
        """
        wanted = max(self._oldest, epoch - self._staleness)
        with self._standing_still():
            self._begin(epoch, embeddings, training=wanted < epoch)
            if wanted == epoch:
                self._settle()
            if self._table is None or wanted != self.table_epoch:
                self._table = self._receive(wanted)
            return self._table

    def settle(self) -> None:
        """Waits until the service has the rows of every process: they outlive this job from here on.

        Raises:
            NearkinError: this process could not push.
            OtherProcessFailed: another one could not.
        """
        with self._standing_still():
            self._settle()

    def publish(self, epoch: int, embeddings: ClassEmbeddings) -> None:
        """Pushes and waits for the table; nobody trains meanwhile, so it is not counted as standing still."""
        self._begin(epoch, embeddings, training=False)
        self._settle()
        self._table = self._receive(epoch)

    # ------------------------------------------------------------------------------------------ push

    def _begin(self, epoch: int, embeddings: ClassEmbeddings, *, training: bool) -> None:
        """Starts to push this process's rows as they are now; `training` may go on to change them."""
        self._settle()
        self._epoch = epoch
        classes = self._world.share(embeddings.num_classes)
        absent = embeddings.absent(classes).tolist()
        send = partial(self._send, epoch=epoch, num_classes=embeddings.num_classes, absent=absent)
        if training:
            snapshot = embeddings.snapshot(classes)
            self._pushed = self._pushing.submit(_push_blocks, snapshot, classes.start, send)
        else:
            self._pushed = self._pushing.submit(send, embeddings.rows(classes), classes.start)
        if self._world.leads_node:
            self._coming[epoch] = self._reading.submit(self._ask, epoch, self._pushed)

    def _send(
        self, values: torch.Tensor, row_start: int, *, epoch: int, num_classes: int, absent: list[int]
    ) -> str:
        """Runs on a thread; returns the push's id (none without rows) when the service has the rows."""
        if not len(values):
            return ""
        try:
            push = self._client.push(
                values,
                epoch=epoch,
                row_start=row_start,
                num_classes=num_classes,
                k=self.k,
                key=self._config.key,
                engine=self._config.engine,
                wire_dtype=self._config.wire_dtype,
                absent=absent,
                timeout=self._config.timeout,
            )
        except AlreadyExists as error:  # our own of an earlier attempt were removed when we began
            raise AlreadyExists(
                f"epoch {epoch}: {error.message}. {ANOTHER_JOB}", field=error.field
            ) from error
        return push.push_id

    def _settle(self) -> None:
        if self._pushed is None:
            return
        error = self._pushed.exception()
        if error is None:
            self.pushes[self._epoch] = self._pushed.result()
        self._pushed = None
        fail_together(self._world, error)

    # ----------------------------------------------------------------------------------------- table

    def _ask(self, epoch: int, pushed: Future[str] | None) -> NeighbourTable:
        """Runs on a thread; returns the table of exactly this epoch, from our push."""
        # Before its rows are there, the service may not know the run.
        ours = pushed.result() if pushed is not None else self.pushes.get(epoch, "")
        timeout = self._config.timeout
        table = self._client.table(epoch=epoch, timeout=timeout, scores=False)
        if table.epoch == epoch and (not ours or self._client.generation(table.generation).push_id == ours):
            return table
        for generation in self._client.generations():  # a later one's is out already
            if generation.epoch == epoch and ours in ("", generation.push_id):
                return self._client.table(generation=generation.generation, timeout=timeout, scores=False)
        raise NotFound(
            f"the run has no table of our epoch {epoch}, and has one of epoch {table.epoch}: "
            f"ours was removed, or another was pushed. {ANOTHER_JOB}"
        )

    def _receive(self, epoch: int) -> Table:
        """The table of an epoch, one copy per machine; all processes call this."""
        table, header, error = None, None, None
        if self._world.leads_node:
            coming = self._coming.pop(epoch)
            error = coming.exception()
            if error is None:
                table = coming.result()
                header = json.dumps([table.generation, *table.ids.shape])
            else:
                header = ""
        header = tell_node(self._world, header)
        fail_together(self._world, error)
        self.generation, *shape = json.loads(header)
        self.table_epoch = epoch
        logger.info("generation %d of the neighbour table, of epoch %d", self.generation, epoch)
        ids = None if table is None else np.asarray(table.ids)
        return self._share(ids, tuple(shape))

    def _share(self, ids: Table | None, shape: tuple[int, ...]) -> Table:
        if self._world.local_size == 1:
            assert ids is not None
            return ids
        shared = node_array(self._world, shape, np.int32)
        if ids is not None:
            shared[:] = ids
        wait_for_node(self._world)
        return shared

    @contextlib.contextmanager
    def _standing_still(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stall_seconds += time.perf_counter() - start

    # --------------------------------------------------------------------------------------- leftovers

    def _existing(self) -> str:
        """What there is, in words. A push under way may be another job's, and would be dropped by ours."""
        try:
            run = self._client.run_info()
        except NotFound:
            return ""
        if run.generations:
            return f"{run.generations} generations"
        epochs = ", ".join(str(push.epoch) for push in run.pushes)
        return f"a push of epoch {epochs}, perhaps another job's," if epochs else ""

    def _forget_from(self, first_epoch: int) -> None:
        try:
            pushes = self._client.run_info().pushes
        except NotFound:
            return
        for push in pushes:
            if push.epoch >= first_epoch:
                with contextlib.suppress(FailedPrecondition):  # published meanwhile: deleted below
                    self._client.abort(push)
        stale = [g.generation for g in self._client.generations() if g.epoch >= first_epoch]
        for number in stale:
            self._client.delete_generation(number)
        if stale:
            logger.info("removed %d generations of epoch %d and later", len(stale), first_epoch)

    def _oldest_kept(self, first_epoch: int) -> int:
        """The first epoch whose table a job can use that goes on with `first_epoch`."""
        needed = range(max(0, first_epoch - self._staleness), first_epoch)
        if not needed:
            return first_epoch
        try:
            pushes, generations = self._client.run_info().pushes, self._client.generations()
        except NotFound:
            pushes, generations = (), ()
        there = {(g.epoch, g.push_id) for g in generations}
        there |= {(push.epoch, push.push_id) for push in pushes if push.state == "building"}
        if {epoch for epoch, push in there if self.pushes.get(epoch, "") in ("", push)}.issuperset(needed):
            return needed.start
        logger.warning(
            "the service has no table of every epoch from %d to %d any more: epoch %d waits for its own",
            needed.start,
            first_epoch - 1,
            first_epoch,
        )
        return first_epoch


def _push_blocks(snapshot: Snapshot, row_start: int, send: Callable[[torch.Tensor, int], str]) -> str:
    """Runs on a thread; sends a table's rows as they were, in blocks, while training changes them."""
    push_id = ""
    try:
        for start, block in snapshot.blocks(BLOCK_BYTES):
            push_id = send(block, row_start + start)
    finally:
        snapshot.close()
    return push_id
