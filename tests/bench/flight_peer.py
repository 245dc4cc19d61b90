"""The peer of the transport benchmark: an Arrow Flight server in a process of its own, and its client.

It is given every advantage: it keeps what it received where it was received, writes nothing to any file and
checks nothing.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import flight


class _Server(flight.FlightServerBase):  # type: ignore[misc]
    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._kept: list[Any] = []

    def do_put(self, _context: Any, _descriptor: Any, reader: Any, writer: Any) -> None:
        self._kept = [chunk.data for chunk in reader]
        writer.write(b"stored")

    def do_get(self, _context: Any, _ticket: Any) -> Any:
        return flight.RecordBatchStream(pa.Table.from_batches(self._kept))


def batches(rows: NDArray[np.float32], batch_bytes: int) -> list[Any]:
    """The rows, flattened, as record batches of about so many bytes; no copy."""
    values = pa.array(rows.reshape(-1))
    step = max(1, batch_bytes // 4)
    return [pa.record_batch([values.slice(at, step)], names=["values"]) for at in range(0, len(values), step)]


class Peer:
    """A connected Flight client."""

    def __init__(self, location: str) -> None:
        self._client = flight.connect(location)

    def put(self, pieces: list[Any]) -> None:
        """DoPut of all pieces, until the server says that it has them."""
        descriptor = flight.FlightDescriptor.for_path("rows")
        writer, acknowledged = self._client.do_put(descriptor, pieces[0].schema)
        for piece in pieces:
            writer.write_batch(piece)
        writer.done_writing()
        assert acknowledged.read().to_pybytes() == b"stored"
        writer.close()

    def get(self) -> int:
        """DoGet of what was put last; its bytes."""
        return sum(chunk.data.nbytes for chunk in self._client.do_get(flight.Ticket(b"rows")))


@contextmanager
def serving(location: str) -> Iterator[Peer]:
    """A Flight server process at `location` (`grpc+unix:///path` or `grpc://host:port`)."""
    process = subprocess.Popen([sys.executable, "-m", "tests.bench.flight_peer", location])
    try:
        yield _connected(location)
    finally:
        process.terminate()
        process.wait()


def _connected(location: str) -> Peer:
    for _ in range(200):
        try:
            peer = Peer(location)
            peer.put(batches(np.zeros((1, 4), np.float32), 1024))
        except (pa.ArrowException, OSError):
            time.sleep(0.05)
        else:
            return peer
    raise RuntimeError(f"the Flight server at {location} does not answer")


if __name__ == "__main__":
    _Server(sys.argv[1]).serve()
