"""Tables that go out over the bulk lane: from the page cache into the socket, past this process."""

from __future__ import annotations

import os
import socket

from nearkin.v1 import bulk, frames
from nearkin.v1 import neighbours_pb2 as pb

from nearkin_service.metrics import Metrics
from nearkin_service.operations import Reading
from nearkin_service.wire.lane.tickets import TableGrant

_COLUMNS = (pb.TABLE_COLUMN_IDS, pb.TABLE_COLUMN_SCORES)


class TableSender:
    """Runs on a connection's own thread: a slow reader holds up nobody else."""

    def __init__(self, reading: Reading, metrics: Metrics) -> None:
        self._reading = reading
        self._metrics = metrics

    def send(self, connection: socket.socket, grant: TableGrant) -> None:
        """Every block. NotFoundError: the generation was just removed; then nothing was sent."""
        with self._reading.opened(grant.generation, scores=grant.scores) as columns:
            for column, (blocks, descriptor) in zip(_COLUMNS, columns, strict=False):
                for rows in blocks.cut(grant.rows):
                    block = blocks.block(rows)
                    described = bulk.TableBlock(column, rows.start, len(rows), block.crc, memoryview(b""))
                    nbytes = block.payload.nbytes
                    frames.send_head(connection, bulk.table_block_head(described, nbytes), nbytes)
                    _send_file(connection, descriptor, rows.start * (nbytes // len(rows)), nbytes)
                    self._metrics.table_bytes.inc(nbytes)
        self._metrics.table_reads.inc()


def _send_file(connection: socket.socket, descriptor: int, offset: int, count: int) -> None:
    """ConnectionError: the caller takes nothing any more. To tell an error now would look like a part of it."""
    end = offset + count
    while offset < end:
        try:
            sent = os.sendfile(connection.fileno(), descriptor, offset, end - offset)
        except BlockingIOError:
            raise ConnectionAbortedError("it takes nothing any more") from None
        if not sent:
            raise ConnectionAbortedError("the table's file ends before its last row")
        offset += sent
