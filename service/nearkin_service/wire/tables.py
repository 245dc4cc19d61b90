"""ReadTable."""

# ruff: noqa: N802 - the protocol's method names

from __future__ import annotations

from collections.abc import AsyncGenerator

from nearkin import tracing
from nearkin.v1 import bulk
from nearkin.v1 import neighbours_pb2 as pb

from nearkin_service.errors import NotFoundError
from nearkin_service.operations import Core, Places, Reading, TableBlocks
from nearkin_service.ranges import RowRange
from nearkin_service.values import Generation
from nearkin_service.wire import convert
from nearkin_service.wire.handlers import Context
from nearkin_service.wire.lane import BulkLane, TableGrant, shares
from nearkin_service.wire.origin import Origin

_MARGIN_SECONDS = 0.05
"""A wait ends this much before the call's deadline, so that the caller learns why it was in vain."""

_SMALLEST_LANE_BYTES = 1 << 20
"""Less than this is not worth a connection of its own."""

_MAPPED = 4
"""Its reader sums up a table that is mapped: about so many times less work than to send it."""


class TableMethods:
    """The RPC that streams tables."""

    def __init__(self, core: Core, reading: Reading, lane: BulkLane) -> None:
        self._core = core
        self._reading = reading
        self._lane = lane
        self._places = Places(core.config.limits.max_table_streams)

    async def ReadTable(self, request: pb.ReadTableRequest, context: Context) -> AsyncGenerator[bytes, None]:
        origin = Origin.of(context)
        generation = await self._generation(request, context)
        elsewhere = self._elsewhere(generation, request, origin)
        if elsewhere is not None:
            if elsewhere.ids_path:
                await self._core.pacing.turn(_table_bytes(elsewhere) // _MAPPED)
            yield bulk.encode_table_message(elsewhere)
            if elsewhere.ids_path:
                self._core.metrics.table_reads.inc()
            return
        async with self._places.of(request.run):
            generation, columns = await self._opened(request, context)  # of those that there are by now
            yield bulk.encode_table_message(_header(generation, request))
            async for block in self._blocks(generation, columns, request):
                yield block
        self._core.metrics.table_reads.inc()

    def _elsewhere(
        self, generation: Generation, request: pb.ReadTableRequest, origin: Origin
    ) -> pb.TableHeader | None:
        """A header that says where the table is to be had; None: it follows in this stream."""
        header = _header(generation, request)
        large = _table_bytes(header) >= _SMALLEST_LANE_BYTES
        mapped = request.accept_shared_memory and header.row_count == generation.spec.num_classes
        by_socket = mapped and origin is Origin.SOCKET  # who needs no more than the paths
        by_tcp = mapped and self._lane.shows_host(origin)
        if request.accept_bulk_lane and (by_tcp or (large and not by_socket)):
            rows = generation.rows_of(request.row_start, request.row_count)
            grant = TableGrant(generation, rows, request.with_scores, tracing.here())
            if lane := self._lane.offer(grant, origin):
                header.bulk_lane.CopyFrom(lane)
        if mapped and shares(origin, header.bulk_lane):
            paths = self._reading.paths(generation)
            header.ids_path, header.scores_path = paths[0], paths[1] if request.with_scores else ""
            return header
        return header if large and header.HasField("bulk_lane") else None

    async def _opened(
        self, request: pb.ReadTableRequest, context: Context
    ) -> tuple[Generation, list[TableBlocks]]:
        """What is read; for who asks for the newest, a later one than a generation that just went."""
        removed = 0
        while True:
            generation = await self._generation(request, context)
            try:
                return generation, await self._reading.columns(generation, scores=request.with_scores)
            except NotFoundError:
                if generation.number in (request.generation, removed):
                    raise
                removed = generation.number

    async def _blocks(
        self, generation: Generation, columns: list[TableBlocks], request: pb.ReadTableRequest
    ) -> AsyncGenerator[bytes, None]:
        rows = generation.rows_of(request.row_start, request.row_count)
        for column, blocks in zip(convert.COLUMNS, columns, strict=False):
            for piece in blocks.cut(rows):
                await self._core.pacing.turn(len(piece) * generation.spec.k * 4)
                data = await self._core.io(_encoded, blocks, piece, column)
                self._core.metrics.table_bytes.inc(len(data))
                yield data

    async def _generation(self, request: pb.ReadTableRequest, context: Context) -> Generation:
        if request.WhichOneof("which") != "min_epoch":
            return self._reading.generation(request.run, request.generation)
        left: float | None = context.time_remaining()  # None without a deadline, whatever the stubs say
        seconds = None if left is None else left - min(_MARGIN_SECONDS, left / 4)
        return await self._reading.since(request.run, request.min_epoch, seconds)


def _header(generation: Generation, request: pb.ReadTableRequest) -> pb.TableHeader:
    rows = generation.rows_of(request.row_start, request.row_count)
    return pb.TableHeader(
        generation=convert.generation(generation),
        row_start=rows.start,
        row_count=len(rows),
        k=generation.spec.k,
        with_scores=request.with_scores,
    )


def _table_bytes(header: pb.TableHeader) -> int:
    return header.row_count * header.k * (8 if header.with_scores else 4)


def _encoded(blocks: TableBlocks, rows: RowRange, column: pb.TableColumn.ValueType) -> bytes:
    block = blocks.block(rows)
    return bulk.encode_table_message(bulk.TableBlock(column, rows.start, len(rows), block.crc, block.payload))
