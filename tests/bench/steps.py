"""What a training step costs per class of the table: `python -m tests.bench.steps [--quick]`.

Steps against as many distinct rows at few classes and at many, in turns, every step with other rows. *whole*
steps are the trainer's (augmentation, network, sparse scores, both optimisers). *rows* leave the network out:
scores of given features, backward, and the update of the rows by each row-wise optimiser; `memory` rows have
no gradient and follow the features. *first* is the very first step of a table. All on one thread. Seconds are
the processor time of this process, which others on the machine disturb less than the time that passes. Memory
is how far the resident set rises above what it was before the step. Medians.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from nearkin_trainer.checkpoint import seed_everything
from nearkin_trainer.classes import ClassEmbeddings, RowOptimiserName, class_means
from nearkin_trainer.config import BatchConfig, ImageConfig, ModelConfig, TrainConfig
from nearkin_trainer.distributed import World
from nearkin_trainer.learner import Learner
from nearkin_trainer.matching import SparseQAConv
from nearkin_trainer.model import build_model

from tests.bench.resident import peak, reset_peak

IMAGES, NEIGHBOURS = 32, 16
SHAPE = (16, 2, 2)
FEW, MANY = 1_000, 1_000_000
WARM_UP = 5
ROUNDS = {"whole step": 30, "rows": 60, "first step": 6}

Batch = tuple[torch.Tensor, torch.Tensor]
Step = Callable[[Batch], object]
Measure = Callable[[Callable[[int], Step], int, int], list[tuple[float, float]]]
Way = RowOptimiserName | Literal["memory"]
WAYS: tuple[Way, ...] = ("sgd", "adagrad", "adam", "memory")


def batches(num_classes: int, count: int) -> list[Batch]:
    """Labels and neighbours that are all different, spread over the whole table."""
    drawn = [torch.randperm(num_classes)[: IMAGES * (1 + NEIGHBOURS)].view(IMAGES, -1) for _ in range(count)]
    return [(order[:, 0], order[:, 1:]) for order in drawn]


def whole_step(num_classes: int) -> Step:
    """Of `Learner`, as `nearkin-train` takes it."""
    config = TrainConfig(
        data=Path("d"),
        out=Path("o"),
        image=ImageConfig(height=16, width=16),
        model=ModelConfig(channels=SHAPE[0]),
        batch=BatchConfig(classes=16),
    )
    seed_everything(0)
    model = build_model(
        config.model, config.image, num_classes, keeping="learnable", device=torch.device("cpu")
    )
    learner = Learner(config, World(), model.train(), total_steps=10_000)
    pixels = torch.randint(0, 256, (IMAGES, 3, 16, 16), dtype=torch.uint8)
    return lambda batch: learner.learn(pixels, *batch)


def rows_step(num_classes: int, way: Way) -> Step:
    """Scores, backward and update of the rows."""
    seed_everything(0)
    classes = ClassEmbeddings(num_classes, *SHAPE, "memory" if way == "memory" else "learnable")
    matcher = SparseQAConv(num_classes, *SHAPE, classes=classes)
    optimiser = None if way == "memory" else classes.optimiser(way)
    features = torch.randn(IMAGES, *SHAPE, requires_grad=True)

    def step(batch: Batch) -> None:
        scores = matcher(features, *batch).scores
        scores.logsumexp(1).sum().backward()
        if optimiser is None:
            classes.remember(class_means(features, batch[0]), momentum=0.5)
            return
        gradient = classes.take_gradient(World())
        assert gradient is not None
        classes.update(optimiser, gradient, rate=1e-3)

    return step


def timed(step: Step, batch: Batch) -> tuple[float, float]:
    """Seconds and MiB of a step."""
    before = reset_peak()
    started = time.process_time()
    step(batch)
    return time.process_time() - started, peak() - before


def later_steps(make: Callable[[int], Step], many: int, rounds: int) -> list[tuple[float, float]]:
    """Seconds and MiB at few and at many classes."""
    sizes = (FEW, many)
    steps = [(make(size), batches(size, rounds + WARM_UP)) for size in sizes]
    found = [[timed(step, drawn[turn]) for step, drawn in steps] for turn in range(rounds + WARM_UP)]
    return _typical(found[WARM_UP:])


def first_steps(make: Callable[[int], Step], many: int, rounds: int) -> list[tuple[float, float]]:
    """The same of new tables' first steps."""
    found = []
    for turn in range(rounds):
        steps = [(make(size), batches(size, 1)[0]) for size in (FEW, many)]
        order = (0, 1) if turn % 2 else (1, 0)  # whoever comes first pays for cold caches
        both = {which: timed(*steps[which]) for which in order}
        found.append([both[0], both[1]])
    return _typical(found)


def _typical(found: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    columns = [zip(*column, strict=True) for column in zip(*found, strict=True)]
    return [(statistics.median(seconds), statistics.median(mib)) for seconds, mib in columns]


def run(quick: bool) -> list[dict[str, object]]:
    """Measure, print a table, and return its rows."""
    torch.set_num_threads(1)
    many = 10_000 if quick else MANY
    rounds = dict.fromkeys(ROUNDS, 3) if quick else ROUNDS
    ways = [(f"rows, {way}", partial(rows_step, way=way)) for way in WAYS]
    measured: list[tuple[str, Measure, Callable[[int], Step], int]] = [
        ("whole step", later_steps, whole_step, rounds["whole step"]),
        *((name, later_steps, make, rounds["rows"]) for name, make in ways),
        *((f"first {name}", first_steps, make, rounds["first step"]) for name, make in ways),
    ]
    rows: list[dict[str, object]] = []
    print(f"{'step':20} {'classes':>10} {'ms':>8} {'MiB':>7} {'against few':>12}")
    for name, measure, make, turns in measured:
        gc.collect()
        found = measure(make, many, turns)
        for classes, (seconds, mib) in zip((FEW, many), found, strict=True):
            ratio = seconds / found[0][0]
            print(f"{name:20} {classes:10,} {1e3 * seconds:8.2f} {mib:7.2f} {ratio:11.3f}x", flush=True)
            rows.append(
                {
                    "name": f"training step, {name}",
                    "classes": classes,
                    "seconds": seconds,
                    "extra_mib": mib,
                    "against_few": ratio,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.steps", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer classes: does it run, not what it costs")
    run(parser.parse_args().quick)


if __name__ == "__main__":
    main()
