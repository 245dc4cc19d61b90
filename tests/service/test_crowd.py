"""Writers and readers by every way there is, an operator, a service that dies at random: nothing is lost.

    NEARKIN_SOAK_ROUNDS=100 NEARKIN_SOAK_SEED=7 pytest -m soak tests/service/test_crowd.py -s

Rows come through shared memory, over the bulk lane (unix socket and TCP) and by bare stubs; in float32 and
float16; all of them, or those that changed. Tables are mapped, or come over the lane or through gRPC, whole
or in part.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_client import FailedPrecondition, NeighbourClient, NotFound
from nearkin_client.patience import Patience

from tests.ports import free_port
from tests.service.conftest import Caller, code_of
from tests.service.faulting import Ordeal, Process, Story, as_table, persistently

ROUNDS = int(os.environ.get("NEARKIN_SOAK_ROUNDS", "100"))
SEED = int(os.environ.get("NEARKIN_SOAK_SEED", "1"))
LIFE = float(os.environ.get("NEARKIN_SOAK_LIFE_SECONDS", "4"))
"""The longest that the service lives."""
PATIENT = Patience(call=600, table=600, outage=600)  # it is never up for long here
IN_PLACE, LANE, FAR, BARE, CHANGED = "in-place", "lane", "far-lane", "bare", "changed"
LARGE: dict[str, Any] = {"k": 256, "least_classes": 600, "most_classes": 601}
"""Enough for rows and tables to go over the bulk lane."""
WAYS = {
    "shared memory": "rows go through shared memory",
    "lane over unix": "the connection is the bulk lane, /",
    "lane over TCP": "the connection is the bulk lane, port",
}
KEEP = pb.Retention(keep_embeddings=1, keep_tables=6, keep_every=5)


def stories(seed: int) -> list[Story]:
    return [
        Story(IN_PLACE, seed),
        Story(LANE, seed, dimensions=512, **LARGE),
        Story(FAR, seed, dimensions=1024, dtype=np.float16, **LARGE),
        Story(BARE, seed, dtype=np.float16),
        Story(CHANGED, seed, least_classes=100, changing=6),
    ]


class Ways(logging.Handler):
    """Which of them pushes say that their rows go."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.taken: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        self.taken.update(way for way, words in WAYS.items() if words in said)


class Crowd(Ordeal):
    """Five writers, seven readers, an operator."""

    def __init__(self, process: Process, far: str, seed: int, longest_life: float) -> None:
        super().__init__(process, seed, stories(seed), longest_life)
        self._far = far
        self._seed = seed
        self.did: Counter[str] = Counter()
        self.pinned: set[tuple[str, int]] = set()

    def callers(self) -> list[Callable[[], None]]:
        near, far = self.process.address, self._far
        return [
            lambda: self._write(IN_PLACE, near, shared=True),
            lambda: self._write(LANE, near, shared=False),
            lambda: self._write(FAR, far, shared=False),
            lambda: self._write(CHANGED, near, shared=True),
            lambda: self._write_by_hand(far),
            lambda: self._read(IN_PLACE, near),
            lambda: self._read(LANE, near),
            lambda: self._read(FAR, far),
            lambda: self._read_by_hand(LANE),
            lambda: self._read_by_hand(BARE),
            lambda: self._ask(CHANGED, near),
            lambda: self._ask(FAR, far),
            self._operate,
        ]

    # ----------------------------------------------------------------------------------------- writers

    def _write(self, run: str, address: str, *, shared: bool) -> None:
        story, base = self.stories[run], 0
        with self._client(address, run, shared=shared) as client:
            for epoch in self.epochs(run):
                rows, absent, changed = story.rows(epoch), story.absent(epoch), story.changed(epoch)
                named: dict[str, Any] = {"changed_rows": changed, "base_generation": base} if changed else {}
                client.push(rows, epoch=epoch, k=story.k, absent=absent, **named)
                if epoch and not story.changing:  # a training that runs ahead meets max_open_pushes_per_run
                    client.table(epoch=epoch - 1)
                if story.changing:
                    base = client.table(epoch=epoch).generation

    @staticmethod
    def _client(address: str, run: str, *, shared: bool) -> NeighbourClient:
        return NeighbourClient(address, run=run, shared_memory="auto" if shared else False, patience=PATIENT)

    def _write_by_hand(self, address: str) -> None:
        story, caller = self.stories[BARE], Caller(address)
        for epoch in self.epochs(BARE):
            persistently(lambda: story.push(caller, epoch, retention=KEEP))  # noqa: B023 - called at once
            persistently(lambda: story.table(caller, epoch))  # noqa: B023
        caller.channel.close()

    # ----------------------------------------------------------------------------------------- readers

    def _read(self, run: str, address: str) -> None:
        """Any epoch acknowledged so far; whole, mapped where that can be, and some rows of it."""
        chance = random.Random(run + address)
        with self._client(address, run, shared=run == IN_PLACE) as client:
            while count := self.acknowledged(run):
                table = client.table(epoch=chance.randrange(count))
                self.tally.compare(self.stories[run], as_table(run, table))
                start = chance.randrange(len(table) - 1)
                stop = chance.randint(start + 1, len(table))
                with suppress(NotFound):  # the operator was quicker
                    part = client.table(generation=table.generation, rows=(start, stop))
                    self.tally.compare(self.stories[run], as_table(run, part))
                    self.did["parts of tables"] += 1
                if self.stopped.wait(0.02):
                    return

    def _read_by_hand(self, run: str) -> None:
        chance, caller = random.Random(run), Caller(self.process.address)
        while count := self.acknowledged(run):
            epoch = chance.randrange(count)
            table = persistently(lambda: self.stories[run].table(caller, epoch))  # noqa: B023
            self.tally.compare(self.stories[run], table)
            number = chance.randint(1, table.generation.generation)
            try:
                earlier = persistently(lambda: caller.table(run=run, generation=number))  # noqa: B023
                self.tally.compare(self.stories[run], earlier)
            except grpc.RpcError as error:
                kept = run != BARE or number % KEEP.keep_every == 0
                if code_of(error) is not grpc.StatusCode.NOT_FOUND or (
                    kept and (run, number) not in self.deleted
                ):
                    self.tally.losses.append(f"{run} generation {number}: {code_of(error).name}")
            if self.stopped.wait(0.02):
                break
        caller.channel.close()

    def _ask(self, run: str, address: str) -> None:
        """Nearest classes, of classes and of vectors, are those of the table."""
        with self._client(address, run, shared=False) as client:
            while self.acknowledged(run):
                table, story = client.table(epoch=0), self.stories[run]
                present = np.flatnonzero(table.ids[:, 0] >= 0).tolist()
                asked = random.Random(table.generation).sample(present, 3)
                with suppress(FailedPrecondition, NotFound):  # its embeddings may just have been dropped
                    found = client.nearest(classes=asked, generation=table.generation)
                    if not np.array_equal(found.ids, table.ids[asked]):
                        self.tally.losses.append(f"nearest differs in generation {table.generation}")
                    rows = story.rows(table.epoch)[asked].astype(np.float32)
                    found = client.nearest(vectors=rows, k=1, generation=table.generation)
                    if found.ids[:, 0].tolist() != asked:
                        self.tally.losses.append(f"vectors are not their own classes': {found.ids}")
                    self.did["queries"] += 2
                if self.stopped.wait(0.05):
                    return

    # ---------------------------------------------------------------------------------------- operator

    def _operate(self) -> None:
        """Pins, compares, deletes generations that are not the newest, and whole runs of its own."""
        chance = random.Random(self._seed)
        for turn in itertools.count():
            run = chance.choice([LANE, IN_PLACE])
            if not self.acknowledged(run):
                return
            with self._client(self.process.address, run, shared=False) as client:
                newest = client.table(epoch=0).generation
                number = chance.randint(1, newest)
                with suppress(NotFound):  # it was deleted before
                    if chance.random() < 0.5:
                        client.pin(number)
                        self.pinned.add((run, number))
                        self.did["pins"] += 1
                    elif number < newest and (run, number) not in self.pinned:
                        self._delete(client, run, number)
                with suppress(NotFound, FailedPrecondition):
                    client.compare(base=max(newest - 1, 1), generation=newest)
                    self.did["comparisons"] += 1
            if turn % 3 == 2:
                self._have_a_brief_run(turn)
            if self.stopped.wait(0.1):
                return

    def _delete(self, client: NeighbourClient, run: str, number: int) -> None:
        """Whether it has gone is for the service to know, should it die meanwhile."""
        self.deleted.add((run, number))
        with suppress(ConnectionError, NotFound):
            client.delete_generation(number)
        self.did["deleted generations"] += 1

    def _have_a_brief_run(self, turn: int) -> None:
        name = f"brief-{turn}"
        with self._client(self.process.address, name, shared=True) as client:
            client.push(self.stories[BARE].rows(turn).astype(np.float32), epoch=0, k=2)
            for _ in range(1000):
                with suppress(ConnectionError):
                    client.delete_run()
                if name not in {each.run for each in client.runs()}:
                    self.did["deleted runs"] += 1
                    return
            self.tally.losses.append(f"{name} cannot be deleted")


def soak(folder: Path, rounds: int, seed: int, longest_life: float) -> None:
    far, ways = f"127.0.0.1:{free_port()}", Ways()
    loggers = logging.getLogger("nearkin.client.push"), logging.getLogger("nearkin.client")
    loggers[1].addHandler(ways)
    for logger in loggers:
        logger.setLevel(logging.INFO)
    try:
        with Process(folder, "--listen", far) as process:
            crowd = Crowd(process, far, seed, longest_life)
            crowd.run(rounds)
            summary = crowd.account(keeping_all=[IN_PLACE, LANE, FAR, CHANGED])
    finally:
        loggers[1].removeHandler(ways)
        for logger in loggers:
            logger.setLevel(logging.NOTSET)
    left = {path.name for path in folder.iterdir()} - {"data", "serve.log"}
    crowd.tally.losses += [f"left over: {each}" for each in left]
    checked = subprocess.run(
        [sys.executable, "-m", "nearkin_service", "check", str(process.data)],
        capture_output=True,
        text=True,
        check=False,
    )
    sound = checked.stdout.strip().splitlines()[-1:] if not checked.returncode else checked.stdout
    print(json.dumps({"seed": seed} | summary | {"ways": ways.taken, "did": crowd.did, "check": sound}))
    assert not crowd.tally.losses, crowd.tally.losses[:10]
    assert checked.returncode == 0, checked.stdout
    assert set(ways.taken) == set(WAYS)


@pytest.mark.usefixtures("from_another_host")
def test_a_small_crowd(tmp_path: Path) -> None:
    soak(tmp_path, rounds=3, seed=3, longest_life=2.5)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.usefixtures("from_another_host")
def test_a_crowd_through_hundreds_of_deaths(tmp_path: Path) -> None:
    soak(tmp_path, rounds=ROUNDS, seed=SEED, longest_life=LIFE)
