"""A service that is killed again and again, and callers that go on regardless and compare what they get.

Everything pushed follows from (run, epoch, seed), so that any table can be compared with a brute force at any
time, by anyone, after any number of deaths.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_client.values import NeighbourTable
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
        self.spawn(fault)
        assert self.process is not None
        assert self.process.stdout is not None
        return "ready" in self.process.stdout.readline()

    def spawn(self, fault: str = "") -> None:
        """Starts it without waiting."""
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

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing of a test that went wrong lives on."""
        if self.running:
            self.kill()


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
    least_classes: int = 20
    dtype: type = np.float32
    changing: int = 0
    """Epochs in a row that are of the same classes and differ in a few rows each; 0: all are new."""

    def _random(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *self.run.encode(), epoch])

    def rows(self, epoch: int) -> NDArray[Any]:
        if self.changing and epoch % self.changing:
            rows, changed = self.rows(epoch - 1), self.changed(epoch)
            rows[changed] = self._random(epoch).standard_normal((len(changed), self.dimensions))
            return rows
        random = self._random(epoch)
        classes = int(random.integers(self.least_classes, self.most_classes))
        return random.standard_normal((classes, self.dimensions)).astype(self.dtype)

    def changed(self, epoch: int) -> list[int]:
        """The rows in which an epoch differs from the one before; none: it is another one altogether."""
        if not self.changing or not epoch % self.changing:
            return []
        return sorted({(epoch * each) % self.least_classes for each in (3, 5, 7)})

    def absent(self, epoch: int) -> list[int]:
        return [epoch % 7, 11] if epoch % 3 == 1 and not self.changing else []

    def wrong(self, table: Table) -> str:
        """How a table, or a part of it, differs from the brute force of its epoch; "" if it does not."""
        epoch, ids, start = table.generation.epoch, table.ids.astype(np.int64), table.header.row_start
        scores, expected = brute_force(self, epoch)
        if table.header.row_count < len(expected):
            scores, expected = scores[start : start + len(ids)], expected[start : start + len(ids)]
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

    def push(self, caller: Caller, epoch: int, **changes: Any) -> str:
        """Begins or joins the epoch's push and sends all of its rows; the build follows by itself."""
        rows, absent = self.rows(epoch), self.absent(epoch)
        begun = caller.begin(rows, epoch, run=self.run, k=self.k, absent=absent, **changes)
        if begun.push.state == pb.PUSH_STATE_OPEN:
            caller.write(begun.push.push_id, rows, step=7)
        return begun.push.push_id

    def table(self, caller: Caller, epoch: int) -> Table:
        return caller.table(run=self.run, min_epoch=epoch)


@functools.lru_cache(maxsize=64)
def brute_force(story: Story, epoch: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """All scores, and the ids of the table, of one epoch."""
    rows, absent = story.rows(epoch).astype(np.float64), story.absent(epoch)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    scores = unit @ unit.T
    np.fill_diagonal(scores, -np.inf)
    scores[:, absent] = -np.inf
    ids: NDArray[np.int64] = np.argsort(-scores, axis=1, kind="stable")[:, : story.k]
    ids[absent] = -1
    return scores, ids


def as_table(run: str, found: NeighbourTable) -> Table:
    """What the client library has read, as the bare stubs would have it."""
    generation = pb.Generation(run=run, generation=found.generation, epoch=found.epoch)
    header = pb.TableHeader(generation=generation, row_start=found.row_start, row_count=len(found), k=found.k)
    return Table(header, found.ids, found.scores)


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
    deaths_while_starting: int = 0
    tables_compared: int = 0
    epochs_pushed: dict[str, int] = field(default_factory=dict)
    losses: list[str] = field(default_factory=list)
    generations: dict[tuple[str, int], NDArray[np.int32]] = field(default_factory=dict)
    """ids and scores, as they were when they were first read as a whole."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def compare(self, story: Story, table: Table) -> None:
        """With the brute force, and with what this generation was when it was last read."""
        wrong = story.wrong(table)
        key, start = (story.run, table.generation.generation), table.header.row_start
        assert table.scores is not None
        both = np.stack([table.ids, table.scores.view(np.int32)])
        with self._lock:
            self.tables_compared += 1
            before = self.generations.get(key)
            if before is None and len(table.ids) == len(story.rows(table.generation.epoch)):
                self.generations[key] = both
            elif before is not None and not np.array_equal(before[:, start : start + both.shape[1]], both):
                wrong = wrong or f"{key} was read with other bytes before"
            if wrong:
                self.losses.append(wrong)


class Ordeal:
    """Callers who never stop, and one service that dies again and again."""

    def __init__(self, process: Process, seed: int, stories: Iterable[Story], longest_life: float) -> None:
        self.process = process
        self.tally = Tally()
        self.stopped = threading.Event()
        self.stories = {story.run: story for story in stories}
        self.random = random.Random(seed)
        self.deleted: set[tuple[str, int]] = set()
        self._longest_life = longest_life
        self._began, self._segments = time.monotonic(), segments()

    def callers(self) -> list[Callable[[], None]]:
        """What goes on, each on a thread of its own, until `stopped`."""
        raise NotImplementedError

    def run(self, rounds: int) -> None:
        assert self.process.start(), self.process.log.read_text()[-2000:]
        threads = [threading.Thread(target=self._noting, args=(work,)) for work in self.callers()]
        for thread in threads:
            thread.start()
        while self.tally.rounds < rounds and not self.tally.losses:
            time.sleep(self.random.uniform(0.0, self._longest_life))
            self.process.kill()
            self.tally.rounds += 1
            if self.random.random() < 0.2:
                self._die_while_starting()
            assert self.process.start(), self.process.log.read_text()[-2000:]
        self.stopped.set()
        for thread in threads:
            thread.join()
        assert not self.tally.losses, self.tally.losses[:10]

    def _die_while_starting(self) -> None:
        """At a moment when there is much to lose, or at any."""
        fault = self.random.choice(["start.trash_emptied", "start.recovered", ""])
        if fault:
            self.process.start(fault)
            self.process.ended()
        else:
            self.process.spawn()
            time.sleep(self.random.uniform(0.0, 1.0))
            self.process.kill()
        self.tally.rounds += 1
        self.tally.deaths_while_starting += 1

    def _noting(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.tally.losses.append(f"{type(error).__name__}: {error}")

    def epochs(self, run: str) -> Iterator[int]:
        for epoch in itertools.count():
            if self.stopped.is_set():
                return
            yield epoch
            self.tally.epochs_pushed[run] = epoch + 1

    def acknowledged(self, run: str) -> int:
        """How many epochs of this run have been; waits for the first."""
        while not self.tally.epochs_pushed.get(run) and not self.stopped.is_set():
            time.sleep(0.01)
        return self.tally.epochs_pushed.get(run, 0)

    def account(self, keeping_all: Iterable[str]) -> dict[str, Any]:
        """Reads all that is left once more, ends the service and looks for what nobody needs."""
        tally, caller = self.tally, Caller(self.process.address)
        for run, story in self.stories.items():
            # A channel waits a while after many failures.
            found = persistently(lambda: all_generations(caller, run))  # noqa: B023
            story.table(caller, tally.epochs_pushed[run] - 1)
            for generation in found:
                tally.compare(story, caller.table(run=run, generation=generation.generation))
        for run in keeping_all:
            found = all_generations(caller, run)
            numbers = {each.generation for each in found} | {n for r, n in self.deleted if r == run}
            gone = set(range(1, max(numbers) + 1)) - numbers
            tally.losses += [f"{run}: generation {number} is gone" for number in sorted(gone)]
            epochs = (
                {each.epoch for each in found} if not self.deleted else set(range(tally.epochs_pushed[run]))
            )
            missing = sorted(set(range(tally.epochs_pushed[run])) - epochs)
            tally.losses += [f"{run}: epoch {epoch} was acknowledged and is gone" for epoch in missing]
        caller.channel.close()
        assert self.process.terminate() == 0
        tally.losses += [f"left over: {each}" for each in litter(self.process.data, outcomes=40)]
        tally.losses += [f"left over: {each}" for each in segments() - self._segments]
        return {
            "rounds": tally.rounds,
            "while_starting": tally.deaths_while_starting,
            "seconds": round(time.monotonic() - self._began),
            "epochs": tally.epochs_pushed,
            "generations_seen": len(tally.generations),
            "tables_compared": tally.tables_compared,
            "losses": len(tally.losses),
        }


def all_generations(caller: Caller, run: str) -> list[pb.Generation]:
    found: list[pb.Generation] = []
    token = ""
    while True:
        request = pb.ListGenerationsRequest(run=run, page_token=token)
        page = caller.stub.ListGenerations(request, timeout=30)
        found += page.generations
        token = page.next_page_token
        if not token:
            return found
