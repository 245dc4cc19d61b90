"""The neighbour table of an epoch: every process pushes its rows, one per machine fetches for all of it.

    push(epoch)   this process's rows of the class embeddings; the build starts with the last row of the job
    fetch(epoch)  waits for the table, int32 [num_classes, k]

`refresh` does both at once and keeps the time that this process stood still.

Legend: N classes, k neighbours.
"""

import json
import logging
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
from nearkin_client import NeighbourClient
from nearkin_client.errors import NotFound
from numpy.typing import NDArray

from nearkin_trainer.classes import ClassEmbeddings
from nearkin_trainer.distributed import World, barrier, tell_all, tell_node
from nearkin_trainer.node import node_array, wait_for_node

logger = logging.getLogger("nearkin.trainer.neighbours")

Table = NDArray[np.int32]


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
    """This process's side of the exchange with the service.

    Attributes:
        k: neighbours per class after cutting down.
        stall_seconds: how long this process has waited so far, pushing included.
        generation: number of the last table's generation, 0 before the first.
    """

    def __init__(
        self, world: World, client: NeighbourClient, config: NeighbourConfig, num_classes: int
    ) -> None:
        self._world, self._client, self._config = world, client, config
        self.k = min(config.k, num_classes - 1)
        if self.k < config.k and world.leads:
            logger.info("k=%d is more than %d classes allow; using k=%d", config.k, num_classes, self.k)
        self.stall_seconds = 0.0
        self.generation = 0

    def rewind(self, first_epoch: int) -> None:
        """Removes what an earlier attempt has left of this epoch and later ones; all processes wait."""
        if self._world.leads:
            self._forget_from(first_epoch)
        barrier(self._world)

    def refuse_leftovers(self) -> None:
        """Makes sure that the run has no generations yet.

        Raises:
            ValueError: it has; on every process.
        """
        found = tell_all(self._world, str(self._existing()) if self._world.leads else None)
        if found != "0":
            raise ValueError(
                f"the service already has {found} generations of this run: choose another --run-name, "
                "continue with --resume, or replace them with --overwrite"
            )

    def refresh(self, epoch: int, embeddings: ClassEmbeddings) -> Table:
        """Pushes this process's rows and waits for the table of that epoch; blocks."""
        start = time.perf_counter()
        self.push(epoch, embeddings)
        table = self.fetch(epoch)
        self.stall_seconds += time.perf_counter() - start
        return table

    def push(self, epoch: int, embeddings: ClassEmbeddings) -> None:
        """Sends this process's rows; returns when the service has them."""
        rows = self._world.share(embeddings.num_classes)
        if rows.start == rows.stop:
            return
        self._client.push(
            embeddings.rows(rows),
            epoch=epoch,
            row_start=rows.start,
            num_classes=embeddings.num_classes,
            k=self.k,
            key=self._config.key,
            engine=self._config.engine,
            wire_dtype=self._config.wire_dtype,
            absent=embeddings.absent(rows).tolist(),
            timeout=self._config.timeout,
        )

    def fetch(self, epoch: int) -> Table:
        """The table of an epoch, one copy per machine; all processes of the machine call this.

        Raises:
            RuntimeError: the machine's first process could not get it; the message says why.
        """
        if self._world.local_size == 1:
            return self._ask(epoch)
        ids = None
        if self._world.leads_node:
            try:
                ids = self._ask(epoch)
                header = {"shape": ids.shape, "generation": self.generation}
            except Exception as error:
                tell_node(self._world, json.dumps({"error": f"{type(error).__name__}: {error}"}))
                raise
            tell_node(self._world, json.dumps(header))
        else:
            header = json.loads(tell_node(self._world, None))
            if "error" in header:
                raise RuntimeError(f"no neighbour table for epoch {epoch}: {header['error']}")
        return self._share(ids, header)

    def _ask(self, epoch: int) -> Table:
        table = self._client.table(epoch=epoch, timeout=self._config.timeout, scores=False)
        self.generation = table.generation
        logger.info("epoch %d: generation %d of the neighbour table", epoch, table.generation)
        return np.asarray(table.ids)

    def _share(self, ids: Table | None, header: dict[str, object]) -> Table:
        shape, generation = header["shape"], header["generation"]
        assert isinstance(shape, list | tuple)
        assert isinstance(generation, int)
        shared = node_array(self._world, tuple(shape), np.int32)
        if ids is not None:
            shared[:] = ids
        wait_for_node(self._world)
        self.generation = generation
        return shared

    def _existing(self) -> int:
        try:
            return len(self._client.generations())
        except NotFound:
            return 0

    def _forget_from(self, first_epoch: int) -> None:
        try:
            run = self._client.run_info()
            generations = self._client.generations()
        except NotFound:
            return
        for push in run.pushes:
            if push.epoch >= first_epoch:
                self._client.abort(push)
        stale = [g.generation for g in generations if g.epoch >= first_epoch]
        for number in stale:
            self._client.delete_generation(number)
        if stale:
            logger.info("removed %d generations of epoch %d and later", len(stale), first_epoch)
