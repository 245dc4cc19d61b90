"""What a training step costs per class of the table: `python -m tests.bench.steps [--quick]`.

Whole steps of the trainer (augmentation, network, sparse scores, both optimisers), the same pictures against
as many distinct rows, at few classes and at many, in turns. *rows only* leaves the network out: scores of
given features, backward, and the update of the rows. Memory is how far the resident set rises above what it
was before the step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from nearkin_trainer.checkpoint import seed_everything
from nearkin_trainer.classes import ROW_OPTIMISERS, ClassEmbeddings
from nearkin_trainer.config import BatchConfig, ImageConfig, ModelConfig, TrainConfig
from nearkin_trainer.distributed import World
from nearkin_trainer.learner import Learner
from nearkin_trainer.matching import SparseQAConv
from nearkin_trainer.model import build_model

from tests.bench.matching import _peak, _reset_peak

IMAGES, NEIGHBOURS = 32, 16
SHAPE = (16, 2, 2)
FEW, MANY = 1_000, 1_000_000
WARM_UP = 9  # each batch once, and the pages that it needs

Step = Callable[[], object]


def batch(num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and neighbours that are all different, spread over the whole table."""
    order = torch.randperm(num_classes)[: IMAGES * (1 + NEIGHBOURS)].view(IMAGES, -1)
    return order[:, 0], order[:, 1:]


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
    return lambda: learner.learn(pixels, *batch_of(num_classes))


def rows_only(num_classes: int) -> Step:
    """Scores, backward and update of the rows."""
    seed_everything(0)
    classes = ClassEmbeddings(num_classes, *SHAPE)
    matcher = SparseQAConv(num_classes, *SHAPE, classes=classes)
    optimiser = ROW_OPTIMISERS["adam"](classes.weight)
    features = torch.randn(IMAGES, *SHAPE)

    def step() -> None:
        scores = matcher(features, *batch_of(num_classes)).scores
        scores.logsumexp(1).sum().backward()
        gradient = classes.take_gradient(World())
        assert gradient is not None
        optimiser.update(classes.weight, gradient, rate=1e-3)

    return step


_batches: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}


def batch_of(num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One of a few batches drawn beforehand: permuting all classes is not part of a step."""
    if num_classes not in _batches:
        _batches[num_classes] = [batch(num_classes) for _ in range(8)]
    made = _batches[num_classes]
    made.append(made.pop(0))
    return made[0]


def side_by_side(few: Step, many: Step, rounds: int) -> list[tuple[float, float]]:
    """Median seconds and highest MiB of each, in turns; the first turns warm up."""
    seconds: list[list[float]] = [[], []]
    peaks: list[list[float]] = [[], []]
    for turn in range(rounds + WARM_UP):
        for which, step in enumerate((few, many)):
            before = _reset_peak()
            started = time.perf_counter()
            step()
            if turn >= WARM_UP:
                seconds[which].append(time.perf_counter() - started)
                peaks[which].append(_peak() - before)
    return [(statistics.median(s), statistics.median(p)) for s, p in zip(seconds, peaks, strict=True)]


def run(quick: bool) -> list[dict[str, object]]:
    """Measure, print a table, and return its rows."""
    many = 10_000 if quick else MANY
    rows: list[dict[str, object]] = []
    print(f"{'step':12} {'classes':>10} {'ms':>8} {'MiB':>7} {'against few':>12}")
    for name, make in (("whole", whole_step), ("rows only", rows_only)):
        gc.collect()
        found = side_by_side(make(FEW), make(many), 3 if quick else 30)
        for classes, (seconds, mib) in zip((FEW, many), found, strict=True):
            ratio = seconds / found[0][0]
            print(f"{name:12} {classes:10,} {1e3 * seconds:8.2f} {mib:7.2f} {ratio:11.3f}x", flush=True)
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
