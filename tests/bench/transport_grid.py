"""The measurements behind two choices: chunk size and streams of a push, and the kind of server.

    python -m tests.bench.transport --grid

The grid pushes 1 GiB through a real service: every chunk size with every number of streams, by unix socket
and by TCP, over the bulk lane and through gRPC. The servers are bare ones that receive, checksum and write
the same messages to a file: what gRPC itself costs with threads and with an event loop. Medians of three
rounds after one of warm-up, in GB/s.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import numpy as np
from crc32c import crc32c
from nearkin.v1 import bulk
from nearkin_client import NeighbourClient, push
from nearkin_client.channel import Endpoint
from nearkin_service.config import ServiceConfig
from nearkin_service.server import _options
from numpy.typing import NDArray

from tests.bench.transport import GIB, MIB, Row, _service, _shown

CHUNKS = (1, 2, 4, 8, 16)
STREAMS = (1, 2, 4)
SERVERS = ("asyncio", "threads")
WIDTH = 16_384  # 64 KiB rows: every chunk size is a whole number of them
_ROUNDS = 3
_METHOD = "/bench.Bulk/Write"


def run(quick: bool) -> list[Row]:
    size = 16 * MIB if quick else GIB
    rows = np.random.default_rng(0).standard_normal((size // (4 * WIDTH), WIDTH), dtype=np.float32)
    return _shown(_grid(rows)) + _shown([_server(kind, rows) for kind in SERVERS])


# --------------------------------------------------------------------------------------------------- the grid


def _grid(rows: NDArray[np.float32]) -> list[Row]:
    found: list[Row] = []
    for way, options in (("bulk lane", ()), ("gRPC", ("--bulk-port", "off"))):
        with _service(*options) as (service, tcp):
            for kind, address in (("unix", service.address), ("TCP", tcp)):
                found += [
                    {"what": "grid", "by": f"{way}, {kind}", "streams": streams}
                    | _line(address, rows, streams)
                    for streams in STREAMS
                ]
    return found


def _line(address: str, rows: NDArray[np.float32], streams: int) -> Row:
    """Every chunk size with so many streams."""
    run = f"{address[:4]}-{streams}".lower().replace("unix", "local").replace(".", "-")
    writers = [NeighbourClient(address, run=run, shared_memory=False) for _ in range(streams)]
    line: Row = {}
    for chunk in CHUNKS:
        pace = push._Pace(chunk * MIB // (4 * WIDTH), push.STREAM_BYTES // (4 * WIDTH))
        with mock.patch.object(push._Paces, "of", return_value=push._Paces(pace, pace, pace)):
            line[f"{chunk} MiB"] = _pushed(writers, rows, chunk)
    for writer in writers:
        writer.close()
    return line


def _pushed(writers: list[NeighbourClient], rows: NDArray[np.float32], chunk: int) -> float:
    share = len(rows) // len(writers)
    seconds = []
    with ThreadPoolExecutor(len(writers)) as threads:
        for turn in range(1 + _ROUNDS):
            options: Any = {"epoch": chunk * 100 + turn, "k": 4, "num_classes": len(rows), "commit": False}

            def send(at: int, options: Any = options) -> Any:
                part = rows[at * share : (at + 1) * share]
                return writers[at].push(part, row_start=at * share, **options)

            began = time.perf_counter()
            pushes = list(threads.map(send, range(len(writers))))
            seconds.append(time.perf_counter() - began)
            writers[0].abort(pushes[0])
    return _speed(rows, seconds)


def _speed(rows: NDArray[np.float32], seconds: list[float]) -> float:
    return round(rows.nbytes / 1e9 / statistics.median(seconds[1:]), 2)


# ----------------------------------------------------------------------------------------------- the servers


def _server(kind: str, rows: NDArray[np.float32]) -> Row:
    with tempfile.TemporaryDirectory() as directory:
        address = f"unix://{directory}/bare.sock"
        command = [sys.executable, "-m", "tests.bench.transport_grid", kind, address, f"{directory}/rows"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        try:
            send: Any = Endpoint(address).open_channel().stream_unary(_METHOD)
            seconds = []
            for _ in range(1 + _ROUNDS):
                began = time.perf_counter()
                send(_messages(rows))
                seconds.append(time.perf_counter() - began)
        finally:
            process.terminate()
            process.wait()
    return {"what": "bare server, unix, 1 stream of 4 MiB", "by": kind, "GB/s": _speed(rows, seconds)}


def _messages(rows: NDArray[np.float32]) -> Iterator[bytes]:
    step = 4 * MIB // (4 * WIDTH)
    for at in range(0, len(rows), step):
        payload = memoryview(rows[at : at + step].reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        yield bulk.encode_write_rows(bulk.WriteRows("push", at, payload, crc32c(payload)))


class _Store:
    """What either server does with a message."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)

    def __call__(self, message: bulk.WriteRows) -> None:
        assert crc32c(message.payload) == message.crc32c
        self._file.seek(message.row_start * 4 * WIDTH)
        self._file.write(message.payload)


def _serve_threads(address: str, store: Callable[[bulk.WriteRows], None]) -> None:
    def write(messages: Iterator[bulk.WriteRows], _context: Any) -> bytes:
        for message in messages:
            store(message)
        return b""

    server = grpc.server(ThreadPoolExecutor(8), options=_options(_CONFIG))
    server.add_generic_rpc_handlers((_handler(write),))
    server.add_insecure_port(address)
    server.start()
    print("ready", flush=True)
    threading.Event().wait()


async def _serve_asyncio(address: str, store: Callable[[bulk.WriteRows], None]) -> None:
    async def write(messages: AsyncIterator[bulk.WriteRows], _context: Any) -> bytes:
        """Like the service: one message is stored on a thread while the next one is received."""
        storing = None
        async for message in messages:
            if storing is not None:
                await storing
            storing = asyncio.get_running_loop().run_in_executor(None, store, message)
        if storing is not None:
            await storing
        return b""

    server = grpc.aio.server(options=_options(_CONFIG))
    server.add_generic_rpc_handlers((_handler(write),))
    server.add_insecure_port(address)
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


def _handler(write: Callable[..., Any]) -> grpc.GenericRpcHandler:
    method = grpc.stream_unary_rpc_method_handler(write, bulk.decode_write_rows, bytes)
    return grpc.method_handlers_generic_handler("bench.Bulk", {"Write": method})


_CONFIG = ServiceConfig(data_dir=Path("unused"), listen=("127.0.0.1:0",))


if __name__ == "__main__":
    _, kind, address, file = sys.argv
    if kind == "threads":
        _serve_threads(address, _Store(Path(file)))
    else:
        asyncio.run(_serve_asyncio(address, _Store(Path(file))))
