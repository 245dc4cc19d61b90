"""A service that is killed again and again, and callers that go on regardless and compare what they get.

Everything pushed follows from (run, epoch, seed), so that any table can be compared with a brute force at any
time, by anyone, after any number of deaths.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from numpy.typing import NDArray

from tests.badline import BadLine, bad_line
from tests.service.conftest import Caller, Table, code_of

T = TypeVar("T")
START_SECONDS = 60.0
FAR_PORT = 50051
GAP = 1e-6
"""Neighbours whose float64 scores are closer than this may stand in either order."""
PASSING = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)
"""What a caller sees of a service that dies or starts; everything else is an answer."""


class Process:
    """`nearkin-serve` on one data directory and one socket, started as often as it dies."""

    def __init__(self, folder: Path, *options: str, prefix: tuple[str, ...] = ()) -> None:
        """`prefix`: a command that runs a command, such as one that enters a namespace."""
        self.folder = folder
        self.data = folder / "data"
        self.address = f"unix://{folder}/s.sock"
        self.log = folder / "serve.log"
        self.process: subprocess.Popen[str] | None = None
        self._options = options
        self._prefix = prefix

    def start(self, fault: str = "") -> bool:
        """Whether it became ready; False: it died before."""
        command = [*self._prefix, sys.executable, "-m", "nearkin_service", "--data-dir", str(self.data)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"NEARKIN_FAULT": fault} if fault else {})
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, "--listen", self.address, "--device", "cpu", "--engine", "flat", *self._options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        assert self.process.stdout is not None
        return "ready" in self.process.stdout.readline()

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.ended()

    def terminate(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self, seconds: float = START_SECONDS) -> int:
        """Its exit status, once it has one."""
        assert self.process is not None
        assert self.process.stdout is not None
        status = self.process.wait(seconds)
        self.process.stdout.close()
        return status

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


@contextmanager
def far_service(
    folder: Path, loss: float, delay_ms: float, jitter_ms: float
) -> Iterator[tuple[Process, BadLine]]:
    """A service at the other end of a bad line. Skips where there can be none."""
    try:
        with bad_line(loss, delay_ms, jitter_ms) as line:
            listen = ("--listen", f"{line.host}:{FAR_PORT}", "--insecure")
            process = Process(folder, *listen, prefix=("ip", "netns", "exec", line.namespace))
            assert process.start(), process.log.read_text()
            try:
                yield process, line
            finally:
                if process.running:
                    process.kill()
    except PermissionError as error:
        pytest.skip(f"no network namespaces and TUN devices here: {error}")


@dataclass(frozen=True)
class Story:
    """What a run's epochs consist of."""

    run: str
    seed: int = 0
    k: int = 4
    dimensions: int = 12
    most_classes: int = 200

    def _random(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *self.run.encode(), epoch])

    def rows(self, epoch: int) -> NDArray[np.float32]:
        random = self._random(epoch)
        classes = int(random.integers(20, self.most_classes))
        return random.standard_normal((classes, self.dimensions)).astype(np.float32)

    def absent(self, epoch: int) -> list[int]:
        return [epoch % 7, 11] if epoch % 3 == 1 else []

    def wrong(self, table: Table) -> str:
        """How a table differs from the brute force of its epoch; "" if it does not."""
        epoch, ids = table.generation.epoch, table.ids.astype(np.int64)
        scores, expected = self._brute_force(epoch)
        if ids.shape != expected.shape:
            return f"{self.run} epoch {epoch}: shape {ids.shape}, not {expected.shape}"
        theirs = np.take_along_axis(scores, np.maximum(ids, 0), axis=1)
        ours = np.take_along_axis(scores, np.maximum(expected, 0), axis=1)
        with np.errstate(invalid="ignore"):  # -inf - -inf, where both say that there is none
            differing = (ids != expected) & ~(np.abs(theirs - ours) < GAP)
        if differing.any():
            row = int(np.flatnonzero(differing.any(axis=1))[0])
            return f"{self.run} epoch {epoch} row {row}: {ids[row]}, not {expected[row]}"
        return ""

    def _brute_force(self, epoch: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        rows, absent = self.rows(epoch).astype(np.float64), self.absent(epoch)
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        scores = unit @ unit.T
        np.fill_diagonal(scores, -np.inf)
        scores[:, absent] = -np.inf
        ids: NDArray[np.int64] = np.argsort(-scores, axis=1, kind="stable")[:, : self.k]
        ids[absent] = -1
        return scores, ids

    def push(self, caller: Caller, epoch: int, **changes: Any) -> str:
        """Begins or joins the epoch's push and sends all of its rows; the build follows by itself."""
        rows, absent = self.rows(epoch), self.absent(epoch)
        begun = caller.begin(rows, epoch, run=self.run, k=self.k, absent=absent, **changes)
        if begun.push.state == pb.PUSH_STATE_OPEN:
            caller.write(begun.push.push_id, rows, step=7)
        return begun.push.push_id

    def table(self, caller: Caller, epoch: int) -> Table:
        return caller.table(run=self.run, min_epoch=epoch)


def persistently(call: Callable[[], T], stopped: threading.Event | None = None, seconds: float = 900.0) -> T:
    """Repeats a call through deaths and starts of the service."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            gone = stopped is not None and stopped.is_set()
            if code_of(error) not in PASSING or time.monotonic() > deadline or gone:
                raise
            time.sleep(0.02)


def litter(data: Path, *, outcomes: int = 0) -> list[str]:
    """What lies in a stopped service's data directory that nobody needs."""
    found = [
        str(path.relative_to(data))
        for path in data.rglob("*")
        if "aside" in path.name or path.parent.name in ("trash", "quarantine")
    ]
    pushes = [str(path.relative_to(data)) for path in data.glob("runs/*/pushes/*")]
    return found + (pushes if len(pushes) > outcomes else [])


def segments() -> set[str]:
    """Shared memory that bears our name."""
    return {path.name for path in Path("/dev/shm").glob("*nearkin*")}


@dataclass
class Tally:
    """What a soak saw. `losses` must stay empty."""

    rounds: int = 0
    tables_compared: int = 0
    epochs_pushed: dict[str, int] = field(default_factory=dict)
    losses: list[str] = field(default_factory=list)
    digests: dict[tuple[str, int], bytes] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def compare(self, story: Story, table: Table) -> None:
        """With the brute force, and with what this generation was when it was last read."""
        wrong = story.wrong(table)
        key = (story.run, table.generation.generation)
        digest = table.ids.tobytes() + (table.scores.tobytes() if table.scores is not None else b"")
        with self._lock:
            self.tables_compared += 1
            if self.digests.setdefault(key, digest) != digest:
                wrong = wrong or f"{key} was read with other bytes before"
            if wrong:
                self.losses.append(wrong)
