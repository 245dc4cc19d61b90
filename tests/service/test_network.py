"""A line that loses, delays and holds up packets, and is cut: callers notice nothing but time.

    NEARKIN_NETWORK_SECONDS=600 NEARKIN_SOAK_SEED=7 pytest -m soak tests/service/test_network.py -s

Real packets between two network namespaces, see tests/badline.py; skipped where those may not be made.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from nearkin_client import (
    FailedPrecondition,
    GenerationPublished,
    NeighbourClient,
    NeighbourTable,
    RunSnapshot,
)
from nearkin_client.patience import Patience

from tests.badline import BadLine
from tests.service.faulting import FAR_PORT, Story, Tally, as_table, far_service, litter

SECONDS = float(os.environ.get("NEARKIN_NETWORK_SECONDS", "240"))
SEED = int(os.environ.get("NEARKIN_SOAK_SEED", "1"))
LAST_EPOCH = 10_000
"""Pushed once the others are at their end."""
PATIENT = Patience(call=600, table=600, push=600, outage=600)


class Callers:
    """A writer, a reader, one who asks and one who watches, each through connections of its own."""

    def __init__(self, address: str, story: Story) -> None:
        self.address = address
        self.story = story
        self.tally = Tally()
        self.stopped = threading.Event()
        self.watched: set[int] = set()
        jobs = (self._write, self._read, self._ask, self._watch)
        self.threads = [threading.Thread(target=self._noting, args=(job,), daemon=True) for job in jobs]

    def _noting(self, job: Callable[[NeighbourClient], None]) -> None:
        try:
            with NeighbourClient(self.address, run=self.story.run, patience=PATIENT) as client:
                job(client)
        except Exception as error:
            self.tally.losses.append(f"{job.__name__}: {type(error).__name__}: {error}")

    @property
    def epochs(self) -> int:
        return self.tally.epochs_pushed.get(self.story.run, 0)

    def _write(self, client: NeighbourClient) -> None:
        epoch = 0
        while not self.stopped.is_set():
            rows, absent = self.story.rows(epoch), self.story.absent(epoch)
            client.push(rows, epoch=epoch, k=self.story.k, absent=absent)
            self._compare(client.table(epoch=epoch))
            epoch += 1
            self.tally.epochs_pushed[self.story.run] = epoch

    def _read(self, client: NeighbourClient) -> None:
        picks = random.Random(self.story.seed)
        while not self.stopped.is_set():
            if self.epochs:
                self._compare(client.table(generation=picks.randrange(self.epochs) + 1))
            time.sleep(0.02)

    def _ask(self, client: NeighbourClient) -> None:
        while not self.stopped.is_set():
            if self.epochs:
                table = client.table()
                with suppress(FailedPrecondition):  # its embeddings were dropped while the line was bad
                    found = client.nearest(classes=[13], generation=table.generation)
                    if found.ids[0].tolist() != table.ids[13].tolist():
                        self.tally.losses.append(f"nearest differs in generation {table.generation}")
            time.sleep(0.1)

    def _watch(self, client: NeighbourClient) -> None:
        """Until the very last epoch is published."""
        for event in client.watch(timeout=3600):
            match event:
                case GenerationPublished(generation=generation):
                    self.watched.add(generation.epoch)
                case RunSnapshot(run=run) if run.newest is not None:
                    self.watched.add(run.newest.epoch)
            if LAST_EPOCH in self.watched:
                return

    def _compare(self, table: NeighbourTable) -> None:
        self.tally.compare(self.story, as_table(self.story.run, table))


def change(line: BadLine, chance: random.Random) -> str:
    """Another weather for a while."""
    kind = chance.choice(["cut", "loss", "delay", "fair"])
    match kind:
        case "cut":
            line.tell("cut")
            time.sleep(chance.uniform(0.1, 3.0))
            line.tell("mend")
        case "loss":
            line.tell(f"loss {chance.uniform(0.01, 0.15)}")
        case "delay":
            line.tell(f"delay {chance.uniform(10, 250)} {chance.uniform(0, 100)}")
        case _:
            line.tell("loss 0")
            line.tell("delay 1 0")
    time.sleep(chance.uniform(0.5, 3.0))
    return kind


def soak(folder: Path, story: Story, seconds: float, *, deaths: bool) -> None:
    chance = random.Random(story.seed)
    changes = dict.fromkeys(("cut", "loss", "delay", "fair", "death"), 0)
    with far_service(folder, 0.02, 20, 10) as (process, line):
        callers = Callers(f"{line.host}:{FAR_PORT}", story)
        for thread in callers.threads:
            thread.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not callers.tally.losses:
            changes[change(line, chance)] += 1
            if deaths and chance.random() < 0.1:
                changes["death"] += 1
                process.kill()
                assert process.start(), process.log.read_text()
        for order in ("mend", "loss 0", "delay 1 0"):
            line.tell(order)
        callers.stopped.set()
        writer, reader, asker, watcher = callers.threads
        for thread in (writer, reader, asker):
            thread.join(300)
        with NeighbourClient(callers.address, run=story.run) as client:
            client.push(story.rows(LAST_EPOCH), epoch=LAST_EPOCH, k=story.k, absent=story.absent(LAST_EPOCH))
            client.table(epoch=LAST_EPOCH)
            kept = {generation.epoch for generation in client.generations()}
        watcher.join(120)
        assert not [thread for thread in callers.threads if thread.is_alive()], callers.tally.losses
        assert process.terminate() == 0
    tally = callers.tally
    missing = set(range(callers.epochs)) - kept
    tally.losses += [f"epoch {epoch} was acknowledged and is gone" for epoch in sorted(missing)]
    tally.losses += [f"left over: {each}" for each in litter(process.data)]
    summary = {
        "seconds": seconds,
        "seed": story.seed,
        **changes,
        "epochs": callers.epochs,
        "epochs_watched": len(callers.watched),
        "tables_compared": tally.tables_compared,
        "losses": len(tally.losses),
    }
    print(json.dumps(summary))
    assert not tally.losses, tally.losses[:10]
    assert callers.epochs > 0


def test_a_bad_line_costs_time_only(tmp_path: Path) -> None:
    soak(tmp_path, Story("far-away", 3, dimensions=64), seconds=3, deaths=False)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_bad_line_for_minutes(tmp_path: Path) -> None:
    soak(tmp_path, Story("far-away", SEED, dimensions=256, most_classes=600), SECONDS, deaths=True)
