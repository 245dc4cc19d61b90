"""Tables that go out over the bulk lane: from the page cache into the socket."""

from __future__ import annotations

import os
import socket

from nearkin.v1 import bulk, frames

from nearkin_service.operations import Core, Reading, TableBlocks
from nearkin_service.ranges import RowRange
from nearkin_service.wire import convert
from nearkin_service.wire.lane.tickets import TableGrant


class TableSender:
    """Runs on a connection's own thread: a slow reader holds up nobody else."""

    def __init__(self, core: Core, reading: Reading) -> None:
        self._reading = reading
        self._metrics = core.metrics
        self._pacing = core.pacing

    def send(self, connection: socket.socket, grant: TableGrant) -> None:
        """Every block. NotFoundError: the generation was just removed; then nothing was sent.

        ConnectionError: the caller takes nothing any more. Told now, it would look like a part of the table.
        """
        with self._reading.opened(grant.generation, scores=grant.scores) as columns:
            try:
                for column, (blocks, descriptor) in zip(convert.COLUMNS, columns, strict=False):
                    self._send_column(connection, column, blocks, descriptor, grant.rows)
            except BlockingIOError:
                raise ConnectionAbortedError("it takes nothing any more") from None
        self._metrics.table_reads.inc()

    def _send_column(
        self,
        connection: socket.socket,
        column: int,
        blocks: TableBlocks,
        descriptor: int,
        rows: RowRange,
    ) -> None:
        for piece in blocks.cut(rows):
            block = blocks.block(piece)
            nbytes = block.payload.nbytes
            described = bulk.TableBlock(column, piece.start, len(piece), block.crc, memoryview(b""))
            self._pacing.wait(nbytes)
            frames.send_head(connection, bulk.table_block_head(described, nbytes), nbytes)
            if connection.family == socket.AF_UNIX:
                _send_file(connection, descriptor, piece.start * (nbytes // len(piece)), nbytes)
            else:  # TCP takes twice as long to hand out single pages as to copy longer runs first
                connection.sendall(block.payload)
            self._metrics.table_bytes.inc(nbytes)


def _send_file(connection: socket.socket, descriptor: int, offset: int, count: int) -> None:
    end = offset + count
    while offset < end:
        sent = os.sendfile(connection.fileno(), descriptor, offset, end - offset)
        if not sent:
            raise ConnectionAbortedError("the table's file ends before its last row")
        offset += sent
