"""Reading a neighbour table: blocks into place, checked, and going on after a lost connection."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
from nearkin.v1 import bulk
from nearkin.v1 import neighbours_pb2 as pb
from nearkin.v1.checksums import crc32c, followed_by
from numpy.typing import NDArray

from nearkin_client.doors import NoLane
from nearkin_client.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    NotReadyInTime,
    PushFailed,
    status_of,
)
from nearkin_client.patience import Deadline, Persistence, interrupted, meaning
from nearkin_client.shared import map_table, not_shared, require_this_host
from nearkin_client.values import NeighbourTable
from nearkin_client.wire import Wire

log = logging.getLogger("nearkin.client.table")

DAMAGED_ATTEMPTS = 3
"""How often a table that arrived damaged is read again before `DataLoss` is raised."""


def read_table(
    wire: Wire, request: pb.ReadTableRequest, deadline: Deadline, doing: str, *, must_share: bool = False
) -> NeighbourTable:
    """The whole answer to `request`; waits for its epoch up to the deadline, through outages.

    FailedPrecondition: shared memory must be used and cannot be had.
    """
    persistence = Persistence(deadline, wire.patience.outage)
    exact = request.WhichOneof("which") == "generation"
    damaged = removed = 0
    doubted: str | None = None
    while True:
        reading = _Reading(wire, request, deadline, must_share, doubted)
        try:
            return reading.finish()
        except _NotMapped as why:
            way = "asking once more" if reading.must_share else "read through the connection"
            log.info("%s: %s: %s", doing, way, why)
            doubted, request.accept_shared_memory = reading.door, reading.must_share
        except NoLane as why:
            log.info("%s: read through gRPC: %s", doing, why)
            request.accept_bulk_lane = False
        except grpc.RpcError as error:
            gone = status_of(error)[0] is grpc.StatusCode.NOT_FOUND
            if gone and not exact and reading.generation not in (0, removed):
                removed = reading.generation
                log.info("%s: generation %d was removed under way; looking for a later one", doing, removed)
                continue
            if not interrupted(error):
                raise _meaning(error, request, deadline, doing) from error
            persistence.waited()
            persistence.pause_or_raise(error, doing)
        except DataLoss as error:
            damaged += 1
            if damaged == DAMAGED_ATTEMPTS:
                raise
            log.warning("%s: %s; reading it again", doing, error)


def _meaning(error: grpc.RpcError, request: pb.ReadTableRequest, deadline: Deadline, doing: str) -> Exception:
    """The same codes mean something more exact to somebody who waits for an epoch."""
    waiting = request.WhichOneof("which") == "min_epoch"
    found = meaning(error, doing, deadline)
    if waiting and isinstance(found, DeadlineExceeded):
        return NotReadyInTime(found.message, field="timeout")
    if waiting and isinstance(found, FailedPrecondition):
        return PushFailed(found.message)
    return found


class _NotMapped(Exception):  # noqa: N818 - nothing is wrong: the blocks are read instead
    """The service's files cannot be opened here, or are gone already."""


class _Reading:
    """One attempt."""

    def __init__(
        self,
        wire: Wire,
        request: pb.ReadTableRequest,
        deadline: Deadline,
        must_share: bool,
        doubted: str | None,
    ) -> None:
        """`doubted`: by this door it did not show that it is here; it may have been started again since."""
        self._wire = wire
        self._request = request
        self._deadline = deadline
        self.must_share = must_share and not request.row_count
        self._doubted = doubted
        self.generation = 0
        """Which one the service chose, once it has said so."""
        self.door = ""
        """By which it shows that it is on this host; another one after each start."""

    def finish(self) -> NeighbourTable:
        messages = self._wire.read_table(self._request, self._deadline.remaining)
        header = bulk.decode_table_message(next(messages))
        if not isinstance(header, pb.TableHeader):
            raise DataLoss("a neighbour table arrived without its header")
        self.generation = header.generation.generation
        self.door = header.bulk_lane.local.name
        if header.ids_path or self.must_share:
            return self._mapped(header)
        shape, memory = (header.row_count, header.k), self._wire.memory
        columns: dict[int, NDArray[Any]] = {pb.TABLE_COLUMN_IDS: memory.empty(shape, "<i4")}
        if header.with_scores:
            columns[pb.TABLE_COLUMN_SCORES] = memory.empty(shape, "<f4")
        if header.HasField("bulk_lane"):
            lane = self._wire.lane(header.bulk_lane)
            checksums = lane.read_table(columns, header.row_start, max(self._deadline.remaining, 0.001))
        else:
            checksums = _fill(columns, header.row_start, messages)
        return _table(header, columns, checksums)

    def _mapped(self, header: pb.TableHeader) -> NeighbourTable:
        """The service's own files, one copy for all readers; they last while they are mapped."""
        try:
            require_this_host(self._wire, header.bulk_lane)
            columns: dict[int, NDArray[Any]] = {
                column: map_table(path, (header.row_count, header.k), dtype)
                for column, path, dtype in (
                    (pb.TABLE_COLUMN_IDS, header.ids_path, "<i4"),
                    (pb.TABLE_COLUMN_SCORES, header.scores_path, "<f4"),
                )
                if column == pb.TABLE_COLUMN_IDS or header.with_scores
            }
        except (OSError, ValueError) as error:
            if self.must_share and self.door == self._doubted:
                raise not_shared(error) from error
            raise _NotMapped(str(error)) from error
        try:
            checksums = {name: crc32c(each.data.cast("B")) for name, each in columns.items()}
            return _table(header, columns, checksums)
        except DataLoss as error:
            why = f"{header.ids_path}: {error.message}, or it is another file here than the service's"
            if self.must_share:
                raise DataLoss(why) from error
            raise _NotMapped(why) from error


def _fill(columns: dict[int, NDArray[Any]], row_start: int, messages: Iterator[bytes]) -> dict[int, int]:
    """Puts every block in its place; the CRC32C of each column."""
    done, checksums = dict.fromkeys(columns, 0), dict.fromkeys(columns, 0)
    for message in messages:
        block = bulk.decode_table_message(message)
        if not isinstance(block, bulk.TableBlock) or block.column not in columns:
            raise DataLoss("a neighbour table holds a message that was not asked for")
        if crc32c(block.payload) != block.crc32c:
            raise DataLoss("a neighbour table arrived damaged: crc32c of its block differs")
        start = done[block.column]
        part = columns[block.column][start : start + block.row_count]
        if block.row_start != row_start + start or not part.nbytes == block.payload.nbytes > 0:
            raise DataLoss("a block of a neighbour table does not fit its header")
        part[...] = np.frombuffer(block.payload, part.dtype).reshape(part.shape)
        done[block.column] += block.row_count
        checksums[block.column] = followed_by(checksums[block.column], block.crc32c, part.nbytes)
    if any(len(columns[column]) != rows for column, rows in done.items()):
        raise DataLoss("a neighbour table ended before its last row")
    return checksums


def _table(
    header: pb.TableHeader, columns: dict[int, NDArray[Any]], checksums: dict[int, int]
) -> NeighbourTable:
    """What the blocks say is compared with what was published, where all rows are there."""
    generation = header.generation
    published: dict[int, tuple[str, int]] = {
        pb.TABLE_COLUMN_IDS: ("ids", generation.ids_crc32c),
        pb.TABLE_COLUMN_SCORES: ("scores", generation.scores_crc32c),
    }
    for column, table in columns.items():
        name, expected = published[column]
        if header.row_count == generation.num_classes and checksums[column] != expected:
            raise DataLoss(f"a neighbour table arrived damaged: crc32c of its {name} differs")
        table.setflags(write=False)
    ids, scores = columns[pb.TABLE_COLUMN_IDS], columns.get(pb.TABLE_COLUMN_SCORES)
    return NeighbourTable(ids, scores, generation.generation, generation.epoch, header.row_start)
