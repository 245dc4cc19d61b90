"""Any file of a data directory damaged in any way: it is set aside or refused, all else is what it was.

    NEARKIN_SOAK_ROUNDS=1000 NEARKIN_SOAK_SEED=7 pytest -m soak tests/service/test_damaged_directories.py -s

A round is one file, one way, and one start of a real service; no round comes twice.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from nearkin.v1 import neighbours_pb2 as pb

from tests.ports import free_port
from tests.service.conftest import WAIT, Caller, Table, code_of, eventually
from tests.service.faulting import Process, Story, litter

ROUNDS = int(os.environ.get("NEARKIN_SOAK_ROUNDS", "200"))
SEED = int(os.environ.get("NEARKIN_SOAK_SEED", "1"))
GENERATIONS = {"alpha": 3, "beta": 2}
OPEN, ABORTED, LATER = 3, 7, 20
"""Epochs: half of it is there; given up; pushed after the damage."""
MAY_STOP_A_START = {"nearkin.json", "LOCK"}
START_SECONDS = 60.0


def flip_bits(path: Path, chance: random.Random, count: int) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(count if data else 0):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def replace(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def become(path: Path, make: Callable[[], object]) -> None:
    path.unlink()
    make()


@dataclass(frozen=True)
class Damage:
    """One file and what is done to it. `outside` is a file that is none of the service's."""

    path: Path
    others: list[Path]
    outside: Path
    chance: random.Random

    def do(self, way: str) -> None:
        path, size = self.path, self.path.stat().st_size
        ways: dict[str, Callable[[], object]] = {
            "a bit": lambda: flip_bits(path, self.chance, 1),
            "bits": lambda: flip_bits(path, self.chance, 32),
            "cut": lambda: os.truncate(path, self.chance.randrange(size) if size else 0),
            "a byte short": lambda: os.truncate(path, max(size - 1, 0)),
            "longer": lambda: replace(path, path.read_bytes() + self.chance.randbytes(100)),
            "zeroed": lambda: replace(path, bytes(size)),
            "emptied": lambda: os.truncate(path, 0),
            "removed": path.unlink,
            "noise": lambda: replace(path, self.chance.randbytes(size)),
            "another": lambda: replace(path, self.chance.choice(self.others).read_bytes()),
            "directory": lambda: become(path, path.mkdir),
            "link": lambda: become(path, lambda: path.symlink_to(self.outside)),
            "pipe": lambda: become(path, lambda: os.mkfifo(path)),
        }
        ways[way]()


WAYS = (
    "a bit",
    "bits",
    "cut",
    "a byte short",
    "longer",
    "zeroed",
    "emptied",
    "removed",
    "noise",
    "another",
    "directory",
    "link",
    "pipe",
)


@dataclass
class Outcomes:
    """What came of the damage. `losses` must stay empty."""

    counts: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)


class Harness:
    """A sound directory, what is read from it, and as many damaged copies as one likes."""

    def __init__(self, process: Process, port: int, seed: int) -> None:
        folder, self._port = process.folder, port
        self._chance = random.Random(seed)
        self._outside = folder / "outside"
        self._outside.write_bytes(b"not ours" * 1000)
        self._stories = {run: Story(run, seed, most_classes=60) for run in GENERATIONS}
        self._sound = folder / "sound"
        self._process = process
        self.outcomes = Outcomes()
        self._tables: dict[tuple[str, int], Table] = {}
        self._nearest: dict[tuple[str, int], str] = {}
        self._make()

    def _make(self) -> None:
        assert self._process.start(), self._process.log.read_text()
        caller = Caller(self._process.address)
        for run, count in GENERATIONS.items():
            for epoch in range(count):
                self._stories[run].push(caller, epoch)
                self._stories[run].table(caller, epoch)
                if not epoch:
                    caller.stub.PinGeneration(pb.PinGenerationRequest(run=run, generation=1), timeout=WAIT)
        rows = self._stories["alpha"].rows(OPEN)
        begun = caller.begin(rows, OPEN, run="alpha", k=self._stories["alpha"].k)
        caller.write(begun.push.push_id, rows[: len(rows) // 2], step=7)
        given_up = caller.begin(rows, ABORTED, run="beta", k=2).push.push_id
        caller.stub.AbortPush(pb.AbortPushRequest(push_id=given_up), timeout=WAIT)
        for run, count in GENERATIONS.items():
            for number in range(1, count + 1):
                self._kept(caller, run, number)
                self._tables[run, number] = caller.table(run=run, generation=number)
                self._nearest[run, number] = nearest(caller, run, number)
        caller.channel.close()
        assert self._process.terminate() == 0
        self._process.data.rename(self._sound)

    @staticmethod
    def _kept(caller: Caller, run: str, number: int) -> None:
        """Its rows have reached the disk, so that no later start says so."""
        eventually(
            lambda: caller.generation(number, run).embeddings, lambda s: s != pb.EMBEDDINGS_STATE_FLUSHING
        )

    def pairs(self) -> list[tuple[Path, str]]:
        """Every file and every way, the ways in turn, in an order of this seed."""
        files = sorted(path.relative_to(self._sound) for path in self._sound.rglob("*") if path.is_file())
        self._chance.shuffle(files)
        ways = list(WAYS)
        self._chance.shuffle(ways)
        return [
            (file, ways[(at + turn) % len(ways)])
            for turn, (at, file) in itertools.product(range(len(ways)), enumerate(files))
        ]

    def round(self, name: Path, way: str) -> None:
        """Damages a copy, starts a service on it, and compares all that it serves."""
        data = self._process.data
        shutil.copytree(self._sound, data, symlinks=True)
        others = [path for path in data.rglob("*") if path.is_file() and path != data / name]
        Damage(data / name, others, self._outside, self._chance).do(way)
        self._process.log.write_text("")
        found = self._served(name, way)
        log = self._process.log.read_text()
        if "Traceback" in log:
            found.append(f"a traceback: {log[-500:]}")
        if self._outside.read_bytes() != b"not ours" * 1000:
            found.append("a file outside was written")
        self.outcomes.losses += [f"{name}, {way}: {each}" for each in found]
        shutil.rmtree(data)

    def _served(self, name: Path, way: str) -> list[str]:
        """What is wrong."""
        too_long = threading.Timer(START_SECONDS, self._process.kill)
        too_long.start()
        started = self._process.start()
        too_long.cancel()
        if not started:
            self._process.ended()
            self.outcomes.counts["starts refused"] += 1
            return [] if name.name in MAY_STOP_A_START else ["the service did not start"]
        caller = Caller(self._process.address)
        found = self._compared(caller, name, way) + self._metric()
        found += self._goes_on(caller)
        caller.channel.close()
        if self._process.terminate():
            found.append("it did not end well")
        left = litter(self._process.data, outcomes=2)
        return found + [f"left over: {each}" for each in left if not each.startswith("quarantine/")]

    def _compared(self, caller: Caller, name: Path, way: str) -> list[str]:
        """Only what was damaged may be missing, or its queries refused; nothing may be different."""
        found, wrongs = set[tuple[str, int]](), []
        for run in GENERATIONS:
            found |= {(run, each.generation) for each in caller.generations(run)}
        missing = set(self._tables) - found
        wrongs += [f"{each} is gone" for each in missing if not concerns(name, *each)]
        wrongs += [f"{each} came from nowhere" for each in found - set(self._tables)]
        self.outcomes.counts["generations quarantined"] += len(missing)
        for run, number in found & set(self._tables):
            table, before = caller.table(run=run, generation=number), self._tables[run, number]
            assert table.scores is not None
            assert before.scores is not None
            if (table.ids.tobytes(), table.scores.tobytes()) != (
                before.ids.tobytes(),
                before.scores.tobytes(),
            ):
                wrongs.append(f"{run} {number} has other bytes")
            wrongs += [wrong for wrong in (self._stories[run].wrong(table),) if wrong]
            answer = nearest(caller, run, number)
            if answer == "DATA_LOSS" and concerns(name, run, number):
                self.outcomes.counts["queries that end in DATA_LOSS"] += 1
            elif answer == "FAILED_PRECONDITION" and (name.name, way) == ("pinned", "removed"):
                self.outcomes.counts["pins that were gone"] += 1
            elif answer != self._nearest[run, number]:
                wrongs.append(f"nearest in {run} {number}: {answer}, not {self._nearest[run, number]}")
        self.outcomes.counts["tables compared"] += len(found)
        return wrongs

    def _metric(self) -> list[str]:
        """What was set aside is counted; so says the directory."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=WAIT) as reply:
            lines = reply.read().decode().splitlines()
        (counted,) = (float(line.split()[1]) for line in lines if line.startswith("nearkin_quarantined "))
        aside = len(list((self._process.data / "quarantine").iterdir()))
        self.outcomes.counts["starts that set something aside"] += bool(aside)
        return [] if counted == aside else [f"{aside} things are set aside, {counted:g} counted"]

    def _goes_on(self, caller: Caller) -> list[str]:
        """The epoch that was half there can be had, at the second attempt at most; later ones as well."""
        wrongs = []
        try:
            table = self._finished(caller)
        except grpc.RpcError as error:
            self.outcomes.counts["open pushes that had to be begun anew"] += 1
            if code_of(error) not in (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.FAILED_PRECONDITION):
                wrongs.append(f"the open push: {code_of(error).name}: {error}")
            for each in caller.stub.GetRun(pb.GetRunRequest(run="alpha"), timeout=WAIT).pushes:
                caller.stub.AbortPush(pb.AbortPushRequest(push_id=each.push_id), timeout=WAIT)
            table = self._finished(caller)
        wrongs.append(self._stories["alpha"].wrong(table))
        for run, story in self._stories.items():
            story.push(caller, LATER)
            wrongs.append(self._stories[run].wrong(story.table(caller, LATER)))
        return [wrong for wrong in wrongs if wrong]

    def _finished(self, caller: Caller) -> Table:
        story = self._stories["alpha"]
        rows = story.rows(OPEN)
        begun = caller.begin(rows, OPEN, run="alpha", k=story.k)
        caller.write(begun.push.push_id, rows, step=7)
        return story.table(caller, OPEN)


def concerns(name: Path, run: str, number: int) -> bool:
    """Whether a file is one of this generation's."""
    return Path("runs", run, "generations", str(number)) in name.parents


def nearest(caller: Caller, run: str, number: int) -> str:
    """The answer to a query, or the code in which it ends."""
    try:
        found = caller.nearest([13], run=run, generation=number)
    except grpc.RpcError as error:
        return code_of(error).name
    return str([(row.ids, row.scores) for row in found.rows])


def soak(folder: Path, rounds: int, seed: int) -> None:
    port = free_port()
    with Process(folder, "--http", f"127.0.0.1:{port}") as process:
        harness = Harness(process, port, seed)
        pairs = harness.pairs()
        for name, way in pairs[:rounds]:
            harness.round(name, way)
            assert not harness.outcomes.losses, harness.outcomes.losses
    files = len({name for name, _ in pairs[:rounds]})
    summary = {"seed": seed, "rounds": min(rounds, len(pairs)), "files": files, "pairs": len(pairs)}
    print(json.dumps(summary | dict(harness.outcomes.counts) | {"losses": 0}))


def test_a_few_damaged_files(tmp_path: Path) -> None:
    soak(tmp_path, rounds=13, seed=5)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_every_file_damaged_in_every_way(tmp_path: Path) -> None:
    soak(tmp_path, rounds=ROUNDS, seed=SEED)
