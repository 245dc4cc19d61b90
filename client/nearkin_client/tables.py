"""Reading a neighbour table: blocks into place, checked, and going on after a lost connection."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
from crc32c import crc32c
from nearkin.v1 import bulk
from nearkin.v1 import neighbours_pb2 as pb
from numpy.typing import NDArray

from nearkin_client.errors import (
    DataLoss,
    FailedPrecondition,
    NotReadyInTime,
    PushFailed,
    error_from_rpc,
    status_of,
)
from nearkin_client.patience import Deadline, Persistence, interrupted
from nearkin_client.shared import map_table
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
    damaged = 0
    while True:
        try:
            return _Reading(request, must_share).finish(wire.read_table(request, deadline.remaining))
        except _NotMapped as why:
            log.info("%s: read through the connection: %s", doing, why)
            request.accept_shared_memory = False
        except grpc.RpcError as error:
            if not interrupted(error):
                raise _meaning(error, request, deadline, doing) from error
            persistence.pause_or_raise(error, doing)
        except DataLoss as error:
            damaged += 1
            if damaged == DAMAGED_ATTEMPTS:
                raise
            log.warning("%s: %s; reading it again", doing, error)


def _meaning(error: grpc.RpcError, request: pb.ReadTableRequest, deadline: Deadline, doing: str) -> Exception:
    """The same codes mean something more exact to somebody who waits for an epoch."""
    waiting = request.WhichOneof("which") == "min_epoch"
    code, _ = status_of(error)
    if waiting and code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return NotReadyInTime(f"{doing}: not published within {deadline.seconds:g} s", field="timeout")
    if waiting and code is grpc.StatusCode.FAILED_PRECONDITION:
        return PushFailed(error_from_rpc(error).message)
    return error_from_rpc(error)


class _NotMapped(Exception):  # noqa: N818 - nothing is wrong: the blocks are read instead
    """The service's files cannot be opened here, or are gone already."""


class _Reading:
    """One attempt. Once the header is there, `request` asks for that generation and no other."""

    def __init__(self, request: pb.ReadTableRequest, must_share: bool) -> None:
        self._request = request
        self._must_share = must_share and not request.row_count

    def finish(self, messages: Iterator[bytes]) -> NeighbourTable:
        header = bulk.decode_table_message(next(messages))
        if not isinstance(header, pb.TableHeader):
            raise DataLoss("a neighbour table arrived without its header")
        self._request.generation = header.generation.generation
        if header.ids_path or self._must_share:
            return self._table(header, self._mapped(header))
        shape = (header.row_count, header.k)
        columns: dict[int, NDArray[Any]] = {pb.TABLE_COLUMN_IDS: np.empty(shape, "<i4")}
        if header.with_scores:
            columns[pb.TABLE_COLUMN_SCORES] = np.empty(shape, "<f4")
        missing = dict.fromkeys(columns, header.row_count)
        for message in messages:
            block = bulk.decode_table_message(message)
            if not isinstance(block, bulk.TableBlock) or block.column not in columns:
                raise DataLoss("a neighbour table holds a message that was not asked for")
            _check("block", block.payload, block.crc32c)
            _place(block, columns[block.column], block.row_start - header.row_start)
            missing[block.column] -= block.row_count
        if any(missing.values()):
            raise DataLoss("a neighbour table ended before its last row")
        return self._table(header, columns)

    def _mapped(self, header: pb.TableHeader) -> dict[int, NDArray[Any]]:
        """The service's own files, one copy for all readers; they last while they are mapped."""
        try:
            return {
                column: map_table(path, (header.row_count, header.k), dtype)
                for column, path, dtype in (
                    (pb.TABLE_COLUMN_IDS, header.ids_path, "<i4"),
                    (pb.TABLE_COLUMN_SCORES, header.scores_path, "<f4"),
                )
                if column == pb.TABLE_COLUMN_IDS or header.with_scores
            }
        except (OSError, ValueError) as error:
            if self._must_share:
                raise FailedPrecondition(f"shared_memory=True: {error}", field="shared_memory") from error
            raise _NotMapped(str(error)) from error

    @staticmethod
    def _table(header: pb.TableHeader, columns: dict[int, NDArray[Any]]) -> NeighbourTable:
        generation = header.generation
        ids, scores = columns[pb.TABLE_COLUMN_IDS], columns.get(pb.TABLE_COLUMN_SCORES)
        if header.row_count == generation.num_classes:
            _check("ids", ids.data.cast("B"), generation.ids_crc32c)
            if scores is not None:
                _check("scores", scores.data.cast("B"), generation.scores_crc32c)
        for column in columns.values():
            column.setflags(write=False)
        return NeighbourTable(ids, scores, generation.generation, generation.epoch, header.row_start)


def _place(block: bulk.TableBlock, column: NDArray[Any], start: int) -> None:
    part = column[start : start + block.row_count]
    if start < 0 or part.nbytes != block.payload.nbytes:
        raise DataLoss("a block of a neighbour table does not fit its header")
    part[...] = np.frombuffer(block.payload, part.dtype).reshape(part.shape)


def _check(what: str, payload: memoryview, expected: int) -> None:
    if crc32c(payload) != expected:
        raise DataLoss(f"a neighbour table arrived damaged: crc32c of its {what} differs")
