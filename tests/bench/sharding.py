"""How much of the row traffic of a sharded class table is hidden: `python -m tests.bench.sharding [--quick]`.

Two processes on this machine (gloo, sockets) take whole training steps in turns: with rows travelling while
the network computes, and with rows waited for as soon as they set out; also with a table that is whole on
every process, where only gradients travel. *Waiting* is how long a step stands still for rows and gradients,
on the process that waits longer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nearkin_trainer.checkpoint import seed_everything
from nearkin_trainer.classes import ShardedClassEmbeddings, table
from nearkin_trainer.classes.owners import Asking, Errand, UnderWay
from nearkin_trainer.config import BatchConfig, EmbeddingConfig, ImageConfig, ModelConfig, TrainConfig
from nearkin_trainer.distributed import World, barrier, gather_rows, join_world
from nearkin_trainer.learner import Learner, Question
from nearkin_trainer.model import build_model

from tests.trainer.processes import run_together

CLASSES, IMAGES = 8192, 32
WARM_UP = 2
WAYS = {
    "whole, waited for": (False, False),
    "whole, overlapped": (False, True),
    "sharded, waited for": (True, False),
    "sharded, overlapped": (True, True),
}


class Waiting:
    """Counts the seconds that this process stands still for rows, and the bytes that come to it."""

    def __init__(self) -> None:
        self.seconds, self.bytes = 0.0, 0
        for kind in (Asking, UnderWay):
            kind.wait = self._timed(kind.wait)  # type: ignore[method-assign]
        exchange = self._timed(table.exchange)  # type: ignore[attr-defined]
        table.exchange = exchange  # type: ignore[attr-defined]
        send = Errand._send

        def counted(*given: Any) -> UnderWay:
            under_way = send(*given)
            self.bytes += under_way.received.nbytes
            return under_way

        Errand._send = counted  # type: ignore[assignment, method-assign]

    def _timed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any) -> Any:
            started = time.perf_counter()
            try:
                return wait(*given)
            finally:
                self.seconds += time.perf_counter() - started

        return timed

    def taken(self) -> tuple[float, int]:
        """Since the last call."""
        found = self.seconds, self.bytes
        self.seconds, self.bytes = 0.0, 0
        return found


def make(world: World, *, sharded: bool, overlapped: bool) -> Learner:
    config = TrainConfig(
        data=Path("d"),
        out=Path("o"),
        image=ImageConfig(height=64, width=64),
        model=ModelConfig(channels=128),
        batch=BatchConfig(classes=16),
        embedding=EmbeddingConfig(sharded=sharded),
    )
    seed_everything(0)
    model = build_model(
        config.model,
        config.image,
        CLASSES,
        keeping="learnable",
        device=world.device,
        sharded_over=world if sharded else None,
    )
    if isinstance(model.classes, ShardedClassEmbeddings):
        model.classes._owners = replace(model.classes._owners, overlapped=overlapped)
    learner = Learner(config, world, model.train(), total_steps=10_000)
    if not overlapped:
        model.classes.join(World())  # whole tables then exchange gradients after the backward pass
    return learner


def questions(world: World, neighbours: int, count: int) -> list[Question]:
    generator = torch.Generator().manual_seed(world.rank)
    labels = torch.randint(0, CLASSES, (count, IMAGES), generator=generator)
    kin = torch.randint(0, CLASSES, (count, IMAGES, neighbours), generator=generator)
    return [Question(*pair) for pair in zip(labels, kin, strict=True)]


def measure(world: World, neighbours: int, steps: int) -> None:
    waiting = Waiting()
    learners = {name: make(world, sharded=s, overlapped=o) for name, (s, o) in WAYS.items()}
    asked = questions(world, neighbours, steps + WARM_UP + 1)
    pixels = torch.randint(0, 256, (IMAGES, 3, 64, 64), dtype=torch.uint8)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    stalls: dict[str, list[float]] = {name: [] for name in WAYS}
    travelled = 0
    for step in range(steps + WARM_UP):
        for name, learner in learners.items():
            seed_everything(1, step, world.rank)
            upcoming = asked[step + 1] if name.endswith("overlapped") and step + 1 < steps + WARM_UP else None
            barrier(world)
            waiting.taken()
            started = time.perf_counter()
            learner.learn(pixels, asked[step].labels, asked[step].neighbours, upcoming)
            took = time.perf_counter() - started
            stalled, came = waiting.taken()
            travelled = max(travelled, came)
            if step >= WARM_UP:
                seconds[name].append(took)
                stalls[name].append(stalled)
    medians = torch.tensor(
        [[statistics.median(values[name]) for name in WAYS] for values in (seconds, stalls)]
    )
    longest = torch.stack(gather_rows(world, medians)).amax(0)
    if world.leads:
        for name, slowest, still in zip(WAYS, *longest.tolist(), strict=True):
            found = {"name": f"class table, {name}", "k": neighbours, "mib": travelled / 2**20}
            print(json.dumps({**found, "seconds": slowest, "waiting_seconds": still}), flush=True)


def run(quick: bool) -> list[dict[str, object]]:
    """Measure in two processes, print a table, and return its rows."""
    words = ["--here", *(["--quick"] if quick else [])]
    printed = run_together("tests.bench.sharding", *words, seconds=600)
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    print(f"{'rows':32} {'k':>4} {'MiB a step':>10} {'step ms':>8} {'waiting ms':>10}")
    for row in rows:
        took, still = 1e3 * row["seconds"], 1e3 * row["waiting_seconds"]
        print(f"{row['name']:32} {row['k']:4} {row['mib']:10.1f} {took:8.1f} {still:10.1f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.sharding", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps: does it run, not what it costs")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.here:
        run(given.quick)
        return
    with join_world("cpu") as world:
        for neighbours in (8, 64):
            measure(world, neighbours, 2 if given.quick else 12)


if __name__ == "__main__":
    main()
