"""Workers that are killed in the middle of a push: it goes on or is aborted, and nothing of them is left.

NEARKIN_SOAK_ROUNDS=300 NEARKIN_SOAK_SEED=7 pytest -m soak tests/service/test_dying_workers.py -s
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_client import NeighbourClient

from tests.service.conftest import WAIT, Caller, Service, brute_force, eventually
from tests.service.faulting import litter, segments
from tests.service.workers import push, rows_of

Start = Callable[..., Service]
ROUNDS = int(os.environ.get("NEARKIN_SOAK_ROUNDS", "300"))
SEED = int(os.environ.get("NEARKIN_SOAK_SEED", "1"))
SHAPE = (96, 1 << 16)  # 24 MiB
RUN = "mortal"
WAYS = ("unix and shared memory", "unix", "tcp")

forks = multiprocessing.get_context("forkserver")  # a process that has imported everything makes the workers
forks.set_forkserver_preload(["tests.service.workers"])


class Deaths:
    """One run, pushed by workers that mostly do not live to see the end of it."""

    def __init__(self, addresses: tuple[str, ...], seed: int) -> None:
        unix, tcp = addresses
        self._ways = dict(zip(WAYS, ((unix, True), (unix, False), (tcp, False)), strict=True))
        self._chance = random.Random(seed)
        self._caller = Caller(unix)
        self.killed = dict.fromkeys(WAYS, 0)
        self.in_the_middle = self.resumed = self.aborted = 0

    def close(self) -> None:
        self._caller.channel.close()

    def kill_workers(self, epoch: int, count: int) -> None:
        for _ in range(count):
            way = self._chance.choice(WAYS)
            address, shared = self._ways[way]
            ready = forks.Event()
            worker = forks.Process(target=push, args=(address, RUN, epoch, SHAPE, shared, ready))
            worker.start()
            assert ready.wait(WAIT)
            began = time.monotonic()
            while not any(each.rows_stored for each in self._pushes(epoch)) and time.monotonic() < began + 5:
                time.sleep(0.001)
            time.sleep(self._chance.uniform(0.0, 0.03))
            worker.kill()
            worker.join()
            worker.close()
            self.killed[way] += 1
            self.in_the_middle += any(0 < each.rows_stored < each.num_classes for each in self._pushes(epoch))

    def _pushes(self, epoch: int) -> list[pb.Push]:
        runs = self._caller.stub.ListRuns(pb.ListRunsRequest(), timeout=WAIT).runs
        return [each for run in runs for each in run.pushes if each.epoch == epoch]

    def finish(self, epoch: int) -> None:
        """Somebody who lives pushes the rest; or gives it up, and begins anew."""
        rows = rows_of(epoch, *SHAPE)
        address, shared = self._ways[self._chance.choice(WAYS)]
        with NeighbourClient(address, run=RUN, shared_memory="auto" if shared else False) as client:
            for each in self._pushes(epoch) if self._chance.random() < 0.3 else ():
                if each.state == pb.PUSH_STATE_OPEN:
                    client.abort(each.push_id)
                    self.aborted += 1
            client.push(rows, epoch=epoch, k=4)
            self.resumed += 1
            np.testing.assert_array_equal(client.table(epoch=epoch).ids, brute_force(rows[:, :64], 4))


def holding() -> dict[str, int]:
    """Of this process, in which the service lives."""
    return {
        "threads": threading.active_count(),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "mappings": sum("rows.bin" in line for line in Path("/proc/self/maps").read_text().splitlines()),
    }


def let_die(start_service: Start, folder: Path, rounds: int, seed: int) -> None:
    listen = (f"unix://{folder}/nearkin.sock", "127.0.0.1:0")
    service = start_service(listen=listen)
    deaths, began, shared_before = Deaths(service.server.addresses, seed), time.monotonic(), segments()
    deaths.finish(0)  # every thread that there will be is there now
    before, epoch = holding(), 0
    while sum(deaths.killed.values()) < rounds:
        epoch += 1
        deaths.kill_workers(epoch, random.Random(epoch).randint(1, 4))
        deaths.finish(epoch)
    after = eventually(holding, lambda now: all(now[name] <= before[name] + 4 for name in before), seconds=60)
    deaths.close()
    service.stop()
    left = litter(folder / "data", outcomes=40)
    summary = {
        "seed": seed,
        "seconds": round(time.monotonic() - began),
        "killed": deaths.killed,
        "in_the_middle": deaths.in_the_middle,
        "aborted": deaths.aborted,
        "tables_compared": deaths.resumed,
        "before": before,
        "after": after,
        "left_over": len(left),
    }
    print(json.dumps(summary))
    assert not left
    assert segments() == shared_before


def test_workers_killed_in_the_middle_of_a_push(start_service: Start, tmp_path: Path) -> None:
    let_die(start_service, tmp_path, rounds=8, seed=4)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_hundreds_of_dying_workers(start_service: Start, tmp_path: Path) -> None:
    let_die(start_service, tmp_path, rounds=ROUNDS, seed=SEED)
