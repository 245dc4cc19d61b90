"""Moving embeddings and tables: shared memory, unix socket and TCP beside Arrow Flight and a plain copy.

    python -m tests.bench.transport [--quick] [--only PART …] [--grid]

Both sides of every pair are processes of their own on the same cores. Rounds take turns between all ways, in
another order each, so that whatever else the machine does meets all of them alike; figures are medians of
five rounds after two of warm-up, in GB/s (1e9 bytes). Ours check every chunk on both ends and keep the rows
on file; Flight keeps what it received in memory and checks nothing. Our pushes are whole epochs, as of a
training: each is followed by its table, and the next begins when its rows are on the disk.
"""

from __future__ import annotations

import argparse
import importlib
import math
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nearkin_client import NeighbourClient, Retention
from nearkin_client.local import LocalService
from numpy.typing import NDArray

from tests.bench import flight_peer
from tests.bench.afar import from_afar
from tests.client.proxy import cutting_proxy
from tests.ports import free_port

MIB, GIB = 1 << 20, 1 << 30
ROUNDS = 5
BATCHES = (1 * MIB, 4 * MIB, 16 * MIB, 64 * MIB)
MAPS = ((512, 7, 7), (63, 14, 14))
WIDTHS = (25_088, 12_348)
READERS, READING_PROCESSES = 64, 8
LAST = Retention(keep_embeddings=1)  # rows of more epochs would compete for memory with the peers
Row = dict[str, Any]


def run(quick: bool, only: Sequence[str] = ()) -> list[Row]:
    """All measurements, or those named; `quick` only shows that they run."""
    size = 32 * MIB if quick else GIB
    parts: dict[str, Callable[[], list[Row]]] = {
        "push": lambda: _pushes(size, MAPS[0]),
        "push-other-width": lambda: _pushes(size, MAPS[1]),
        "fetch": lambda: _fetches(size),
        "cut": lambda: [_interrupted(size // 4)],
        "memory": lambda: [_memory(4 * size)],
        "readers": lambda: [_readers(quick, size // 4, way) for way in ("afar", "here")],
    }
    if unknown := set(only) - set(parts):
        raise SystemExit(f"no such part: {', '.join(sorted(unknown))}; choose from {', '.join(parts)}")
    results = [row for name in only or parts for row in _shown(parts[name]())]
    return results + _shown(_judged(results))


def _judged(results: list[Row]) -> list[Row]:
    """What was measured beside what was set out to be reached."""
    targets = {"push by shared memory": 3.0} | {
        f"{what} by {way}": 1.0 for what in ("push", "fetch") for way in ("unix socket", "127.0.0.1", "TCP")
    }
    return [
        {"judged": f"{name}, rows of {row['row_width']}", "of_flights_best": row["of_flights_best"]}
        | {"at_least": targets[name], "reached": row["of_flights_best"] >= targets[name]}
        for row in results
        if (name := f"{row['what']} by {row.get('by')}") in targets
    ]


def _rows(count: int, width: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, width), dtype=np.float32)


def _shown(rows: list[Row]) -> list[Row]:
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return rows


@contextmanager
def _service(*options: str) -> Iterator[tuple[LocalService, str]]:
    """A service and its TCP address."""
    with tempfile.TemporaryDirectory(prefix="nearkin-bench-") as data:
        tcp = f"127.0.0.1:{free_port()}"
        with LocalService(data, listen=(tcp,), options=options) as service:
            yield service, tcp


def _alternating(ways: dict[str, Callable[[], float]], nbytes: int) -> dict[str, float]:
    """Median GB/s of each way, which returns the seconds it took; the first two rounds are the warm-up.

    Each round goes in another order: what a way leaves behind, such as memory that the system takes back,
    would else always meet the same one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    chance = random.Random(1)
    for _ in range(2 + ROUNDS):
        for name in chance.sample(list(ways), len(ways)):
            seconds[name].append(ways[name]())
    return {name: round(nbytes / 1e9 / statistics.median(each[2:]), 2) for name, each in seconds.items()}


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _clients(unix: str, tcp: str, run: str = "") -> dict[str, NeighbourClient]:
    """One for each way, by default on a run of its own. 127.0.0.1: which the client finds to be this host."""

    def client(name: str, address: str, *, shared: bool) -> NeighbourClient:
        return NeighbourClient(address, run=run or name, shared_memory=shared)

    return {
        "shared memory": client("shm", unix, shared=True),
        "unix socket": client("unix", unix, shared=False),
        "127.0.0.1": client("here", tcp, shared=False),
        "TCP": from_afar(tcp, run or "tcp"),
    }


# -------------------------------------------------------------------------------------------------- pushing


class _Epochs:
    """Pushes epoch after epoch of one run."""

    def __init__(self, client: NeighbourClient, maps: NDArray[np.float32]) -> None:
        self._client = client
        self._maps = maps
        self._epoch = 0

    def __call__(self) -> float:
        """The seconds of one push. Its table, of pooled maps, is soon built."""
        self._epoch += 1
        push = partial(self._client.push, self._maps, epoch=self._epoch, k=16, key="pooled", retention=LAST)
        seconds = _timed(push)
        number = self._client.table(epoch=self._epoch, timeout=600).generation
        while self._client.generation(number).embeddings == "flushing":
            time.sleep(0.05)
        return seconds


class _Pusher:
    """Pushes that are dropped, so that no build runs beside the next."""

    def __init__(self, client: NeighbourClient, rows: NDArray[np.float32]) -> None:
        self._client = client
        self._rows = rows
        self._epoch = 0

    def __call__(self) -> float:
        self._epoch += 1
        began = time.perf_counter()
        push = self._client.push(self._rows, epoch=self._epoch, k=16, commit=False)
        seconds = time.perf_counter() - began
        self._client.abort(push)
        return seconds


def _pushes(size: int, shape: tuple[int, int, int]) -> list[Row]:
    width = math.prod(shape)
    rows = _rows(size // (4 * width), width)
    maps = rows.reshape(-1, *shape)
    with ExitStack() as stack:
        service, tcp = stack.enter_context(_service())
        peers = _flight_peers(stack)
        goal = np.empty_like(rows)
        ways: dict[str, Callable[[], float]] = {
            name: _Epochs(client, maps) for name, client in _clients(service.address, tcp).items()
        } | {
            "plain copy": lambda: _timed(lambda: np.copyto(goal, rows)),
        }
        for name, peer in peers.items():
            for batch in BATCHES:
                pieces = flight_peer.batches(rows, batch)
                ways[f"{name} {batch // MIB} MiB"] = _put(peer, pieces)
        return _beside_flight("push", width, _alternating(ways, rows.nbytes))


def _flight_peers(stack: ExitStack) -> dict[str, flight_peer.Peer]:
    directory = stack.enter_context(tempfile.TemporaryDirectory())
    places = {
        "Flight unix": f"grpc+unix://{directory}/flight.sock",
        "Flight TCP": f"grpc://127.0.0.1:{free_port()}",
    }
    return {name: stack.enter_context(flight_peer.serving(place)) for name, place in places.items()}


def _put(peer: flight_peer.Peer, pieces: list[Any]) -> Callable[[], float]:
    return lambda: _timed(lambda: peer.put(pieces))


def _beside_flight(what: str, width: int, speeds: dict[str, float]) -> list[Row]:
    best = max(speed for name, speed in speeds.items() if name.startswith("Flight"))
    return [
        {
            "what": what,
            "row_width": width,
            "by": name,
            "GB/s": speed,
            "of_flights_best": round(speed / best, 2),
        }
        for name, speed in speeds.items()
    ]


# ------------------------------------------------------------------------------------------------- fetching


def _fetches(size: int) -> list[Row]:
    """A table of `size` bytes, ids and scores. Mapping one moves nothing; it is checked all the same."""
    count = int((size / 4) ** 0.5)
    k = count // 2
    with ExitStack() as stack:
        service, tcp = stack.enter_context(_service())
        with NeighbourClient(service.address, run="table") as client:
            client.push(_rows(count, 4), epoch=0, k=k)
            client.table(epoch=0, timeout=3600)
        clients = _clients(service.address, tcp, run="table")
        ways: dict[str, Callable[[], float]] = {name: _fetcher(each) for name, each in clients.items()}
        rows = _rows(size // 4096, 1024)
        for name, peer in _flight_peers(stack).items():
            for batch in BATCHES:
                ways[f"{name} {batch // MIB} MiB"] = _getter(peer, rows, batch)
        return _beside_flight("fetch", k, _alternating(ways, count * k * 8))


def _fetcher(client: NeighbourClient) -> Callable[[], float]:
    return lambda: _timed(lambda: client.table(timeout=600))


def _getter(peer: flight_peer.Peer, rows: NDArray[np.float32], batch: int) -> Callable[[], float]:
    def get() -> float:
        peer.put(flight_peer.batches(rows, batch))
        return _timed(peer.get)

    return get


# ------------------------------------------------------------------------------------------------ hardships


def _interrupted(size: int) -> Row:
    """Bytes that a push moves whose connection is cut ten times, as a share of its own."""
    rows = _rows(size // (4 * WIDTHS[0]), WIDTHS[0])
    with _service() as (service, _), cutting_proxy(service.address, rows.nbytes // 12, 10) as proxy:
        with NeighbourClient(proxy.address, run="cut") as client:
            client.push(rows, epoch=0, k=4, commit=False, timeout=600)
        assert proxy.cuts_left == 0
        return {"what": "push cut ten times", "bytes_moved": round(proxy.bytes_up / rows.nbytes, 3)}


def _memory(size: int) -> Row:
    """Peak memory of the service while four writers push by socket: its own pages, not the page cache."""
    rows = _rows(size // 4 // (4 * WIDTHS[0]), WIDTHS[0])
    with _service() as (service, _):
        before = _peak_bytes(service.pid)
        writers = [
            threading.Thread(target=_write_part, args=(service.address, rows, part)) for part in range(4)
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        peak = _peak_bytes(service.pid)
    return {
        "what": f"peak memory of the service, {rows.nbytes * 4 / 1e9:.1f} GB from 4 writers",
        "before_MB": before // 1_000_000,
        "peak_MB": peak // 1_000_000,
    }


def _write_part(address: str, rows: NDArray[np.float32], part: int) -> None:
    with NeighbourClient(address, run="memory", shared_memory=False) as client:
        start, total = part * len(rows), 4 * len(rows)
        client.push(rows, epoch=0, row_start=start, num_classes=total, k=4, commit=False, timeout=600)


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def _readers(quick: bool, size: int, way: str) -> Row:
    """64 readers of a 100k x 64 table, from eight processes, while a push and a build go on.

    `afar` they read by TCP, `here` they map it. A push's rate is compared with what it has before and after,
    with the same rows, while nothing else goes on.
    """
    count, k = (2_000, 16) if quick else (100_000, 64)
    rows = _rows(size // (4 * WIDTHS[0]), WIDTHS[0])
    with _service() as (service, tcp), NeighbourClient(service.address, run="read") as client:
        client.push(_rows(count, 8), epoch=0, k=k)
        table = client.table(epoch=0, timeout=3600)
        pusher = _Pusher(NeighbourClient(service.address, run="beside", shared_memory=False), rows)
        pusher()
        alone = [pusher() for _ in range(5)]
        expected = f"{np.bitwise_xor.reduce(table.ids.view(np.uint32), axis=None):08x}"
        with _reading(tcp, way) as (processes, begin):
            building = client.push(_rows(count, 8) + 1, epoch=1, k=k)
            threading.Timer(0.05, begin).start()  # in the middle of a push
            beside, beside_readers = [pusher()], list[float]()
            while any(process.poll() is None for process in processes):
                both = len(client.generations()) == 1
                (beside if both else beside_readers).append(pusher())
            answers = [line for process in processes for line in process.communicate()[0].split()]
        if len(client.generations()) == 1:
            client.abort(building)
        alone += [pusher() for _ in range(5)]
    return {
        "what": f"{READERS} readers of {count} x {k} beside a push and a build",
        "reading": {"afar": "by TCP", "here": "mapped"}[way],
        "failed": READERS - len(answers),
        "different": sum(answer != expected for answer in answers),
        "push_rate_kept": round(statistics.median(alone) / statistics.median(beside), 2),
        "in_all": round(statistics.mean(alone) / statistics.mean(beside), 2),
        "pushes": len(beside),
        "pushes_beside_readers_alone": len(beside_readers),
    }


@contextmanager
def _reading(address: str, way: str) -> Iterator[tuple[list[subprocess.Popen[str]], Callable[[], None]]]:
    """Processes of eight reading threads each, connected, and what makes them begin together."""
    command = [sys.executable, "-m", "tests.bench.readers", address, str(READERS // READING_PROCESSES), way]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(READING_PROCESSES)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

    def begin() -> None:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()

    yield processes, begin
    for process in processes:
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.transport", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not how fast is it")
    parser.add_argument("--only", nargs="+", default=(), help="these parts: push, fetch, cut, memory, …")
    parser.add_argument(
        "--grid", action="store_true", help="chunk sizes, streams and kinds of server instead"
    )
    arguments = parser.parse_args()
    if arguments.grid:
        importlib.import_module("tests.bench.transport_grid").run(arguments.quick)
    else:
        run(arguments.quick, arguments.only)


if __name__ == "__main__":
    main()
