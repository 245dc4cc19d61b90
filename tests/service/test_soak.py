"""A service killed at random moments while writers push and readers compare; nothing published is ever lost.

    NEARKIN_SOAK_ROUNDS=400 NEARKIN_SOAK_SEED=7 pytest -m soak tests/service/test_soak.py -s

A few rounds of the same run with every test suite. The summary line is what docs/RELIABILITY.md records.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_client import NeighbourClient
from nearkin_client.patience import Patience

from tests.service.conftest import Caller, code_of
from tests.service.faulting import Ordeal, Process, Story, persistently

ROUNDS = int(os.environ.get("NEARKIN_SOAK_ROUNDS", "200"))
SEED = int(os.environ.get("NEARKIN_SOAK_SEED", "1"))
LIBRARY, SPARSE = "library", "sparse"
KEEP = pb.Retention(keep_embeddings=1, keep_tables=4, keep_every=5)


class Soak(Ordeal):
    """Two writers, three readers, one service that dies."""

    def callers(self) -> list[Callable[[], None]]:
        writers: list[Callable[[], None]] = [self._write_by_library, self._write_by_hand]
        return [
            *writers,
            lambda: self._read(LIBRARY),
            lambda: self._read(SPARSE),
            lambda: self._query(LIBRARY),
        ]

    def _write_by_library(self) -> None:
        """Two ranks of a push, one after the other, through the client library; it repeats by itself."""
        story = self.stories[LIBRARY]
        patience = Patience(call=600, table=600, outage=600)  # it is never up for long here
        with NeighbourClient(self.process.address, run=LIBRARY, patience=patience) as client:
            for epoch in self.epochs(LIBRARY):
                rows, absent = story.rows(epoch), story.absent(epoch)
                half, total = len(rows) // 2, len(rows)
                for start, part in ((half, rows[half:]), (0, rows[:half])):
                    client.push(
                        part, epoch=epoch, row_start=start, num_classes=total, k=story.k, absent=absent
                    )
                if epoch:  # a training that runs ahead of its tables would meet max_open_pushes_per_run
                    client.table(epoch=epoch - 1)

    def _write_by_hand(self) -> None:
        """Bare stubs, with retention, and a push in between that is given up."""
        story = self.stories[SPARSE]
        caller = Caller(self.process.address)
        for epoch in self.epochs(SPARSE):
            persistently(lambda: story.push(caller, epoch, retention=KEEP))  # noqa: B023 - called at once
            persistently(lambda: story.table(caller, epoch))  # noqa: B023
            if epoch % 4 == 3:
                persistently(lambda: self._give_up(caller, epoch + 1_000_000))  # noqa: B023
        caller.channel.close()

    def _give_up(self, caller: Caller, epoch: int) -> None:
        begun = caller.begin(self.stories[SPARSE].rows(epoch), epoch, run=SPARSE, k=4)
        caller.stub.AbortPush(pb.AbortPushRequest(push_id=begun.push.push_id), timeout=30)

    def _read(self, run: str) -> None:
        """Any epoch acknowledged so far; the answer is that epoch's table, or a later one's."""
        caller, picks = Caller(self.process.address), random.Random(run)
        while not self.stopped.is_set():
            acknowledged = self.tally.epochs_pushed.get(run, 0)
            if acknowledged:
                epoch = picks.randrange(acknowledged)
                table = persistently(lambda: self.stories[run].table(caller, epoch))  # noqa: B023
                self.tally.compare(self.stories[run], table)
                if table.generation.epoch < epoch:
                    self.tally.losses.append(f"{run}: asked for epoch {epoch}, got {table.generation.epoch}")
                self._reread(caller, run, table.generation.generation)
            time.sleep(0.01)
        caller.channel.close()

    def _reread(self, caller: Caller, run: str, newest: int) -> None:
        """An earlier generation, if retention has left it."""
        number = random.Random(newest * 31).randint(1, newest)
        try:
            table = persistently(lambda: caller.table(run=run, generation=number))
        except grpc.RpcError as error:
            kept = run == LIBRARY or number % KEEP.keep_every == 0
            if code_of(error) is not grpc.StatusCode.NOT_FOUND or kept:
                self.tally.losses.append(f"{run} generation {number}: {code_of(error).name}")
            return
        self.tally.compare(self.stories[run], table)

    def _query(self, run: str) -> None:
        """Nearest classes from the embeddings are those of the table."""
        caller = Caller(self.process.address)
        while not self.stopped.is_set():
            if self.tally.epochs_pushed.get(run):
                table = persistently(lambda: caller.table(run=run, min_epoch=0))
                with suppress(grpc.RpcError):  # its embeddings may just have been dropped
                    found = caller.nearest([13], run=run, generation=table.generation.generation)
                    if found.rows[0].ids != table.ids[13].tolist():
                        self.tally.losses.append(f"nearest differs in generation {found.generation}")
            time.sleep(0.05)
        caller.channel.close()


def soak(tmp_path: Path, rounds: int, seed: int) -> None:
    with Process(tmp_path) as process:
        ordeal = Soak(process, seed, (Story(LIBRARY, seed), Story(SPARSE, seed)), longest_life=1.2)
        ordeal.run(rounds)
        summary = ordeal.account(keeping_all=[LIBRARY])
    print(json.dumps({"seed": seed} | summary))
    assert not ordeal.tally.losses, ordeal.tally.losses[:10]


def test_a_few_deaths(tmp_path: Path) -> None:
    soak(tmp_path, rounds=5, seed=3)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_hundreds_of_deaths(tmp_path: Path) -> None:
    soak(tmp_path, rounds=ROUNDS, seed=SEED)
