"""The epochs of a training job, what is kept between them, and what comes out.

each epoch: push rows ─▶ table ─▶ batches of kin ─▶ learn ─▶ save (the rows are at the service by then)
at the end: push the finished rows, judge unseen images, write metrics.json
"""

import dataclasses
import hashlib
import itertools
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nearkin_trainer import checkpoint
from nearkin_trainer.classes import shards
from nearkin_trainer.config import TrainConfig
from nearkin_trainer.data import DataSet, open_images, to_floats
from nearkin_trainer.distributed import (
    World,
    average_buffers,
    barrier,
    broadcast_module,
    gather_rows,
    sum_over_ranks,
    tell_all,
)
from nearkin_trainer.evaluate import Retrieval
from nearkin_trainer.feed import Numbers, read_ahead
from nearkin_trainer.judge import Judge
from nearkin_trainer.learner import Learner, Question
from nearkin_trainer.model import Model
from nearkin_trainer.neighbours import Neighbours, Table
from nearkin_trainer.report import Report, write_json
from nearkin_trainer.sampling import make_sampler

logger = logging.getLogger("nearkin.trainer.job")

CHECKPOINT = "checkpoint.npz"
METRICS = "metrics.json"
CLASSES = "classes.json"
CONFIG = "config.json"


@dataclass
class Progress:
    """What has been done so far; saved with the weights."""

    epoch: int = 0
    images: int = 0
    train_seconds: float = 0.0
    stall_seconds: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    pushes: dict[int, str] = field(default_factory=dict)  # see `Neighbours.pushes`
    baselines: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """What a job is made of."""

    config: TrainConfig
    world: World
    data: DataSet
    model: Model
    neighbours: Neighbours
    report: Report


class Job:
    """Runs a training from wherever it is to its end."""

    def __init__(self, parts: Parts) -> None:
        self.config, self.world, self.data = parts.config, parts.world, parts.data
        self.model, self.neighbours, self.report = parts.model, parts.neighbours, parts.report
        image, paths = self.config.image, self.data.train.paths
        self.images = open_images(
            self.world, paths, image.height, image.width, memory_bytes=image.memory_bytes
        )
        self.labels = torch.from_numpy(self.data.train.labels)
        self.sampler = make_sampler(
            self.config.batch, self.data.train.labels, len(self.data.classes), self.config.seed, self.world
        )
        self.learner = Learner(self.config, self.world, self.model, self.sampler.steps * self.config.epochs)
        self.judge = Judge(self.world, self.data, image, self.config.evaluate.batch)
        self.progress = Progress()
        self.epochs = self.config.epochs
        self._turns: list[float] = []  # when epochs began, of this call of `run`

    def run(self, start: Path | None) -> dict[str, Any]:
        """Trains from a checkpoint, or from the beginning; returns what `metrics.json` holds."""
        broadcast_module(self.world, self.model, leave=shards.names(self.model.classes))
        if start is not None:
            self._load(start)
        elif not (self.config.overwrite or self.config.resume):
            self.neighbours.refuse_leftovers()
        self.neighbours.rewind(self.progress.epoch)
        if self.world.leads:
            write_json(self.config.out / CLASSES, list(self.data.classes))
            write_json(self.config.out / CONFIG, self.config.plain())
        if start is None:
            self._prepare()
        while self.progress.epoch < self._plan():
            self._epoch(self.progress.epoch)
        return self._finish()

    # ----------------------------------------------------------------------------------------- start

    def _prepare(self) -> None:
        """Shows the new network every training image once: first class embeddings, first statistics."""
        checkpoint.seed_everything(self.config.seed, 0, self.world.rank)
        if self.config.embedding.start == "features":
            self._embed_classes()
        if self.config.evaluate.baselines:
            self.progress.baselines = self._judge_baselines()

    def _embed_classes(self) -> None:
        order = np.random.default_rng([self.config.seed, 3]).permutation(len(self.data.train))
        mine = order[self.world.share(len(order))]
        batches = np.array_split(mine, max(1, math.ceil(len(mine) / self.config.evaluate.batch)))
        self.model.train()
        with torch.no_grad(), self.report.bar("first class embeddings", len(batches)) as bar:

            def features() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
                for numbers, pixels in read_ahead(self.images, batches):
                    images = to_floats(pixels, self.world.device)
                    yield self.model(images), self.labels[numbers].to(self.world.device)
                    bar.advance()

            self.model.classes.start_from(self.world, features())
        average_buffers(self.world, self.model)

    def _judge_baselines(self) -> dict[str, float]:
        pixels, untrained = self.judge.pixels(), self.judge.features(self.model)
        self.report.say(
            f"before training: raw pixels {_line(pixels)}; untrained network {_line(untrained['qaconv'])}, "
            f"flattened cosine {_line(untrained['cosine'])}"
        )
        return {
            "baseline_pixels_rank1": pixels.rank1,
            "baseline_pixels_mAP": pixels.mAP,
            "baseline_untrained_rank1": untrained["qaconv"].rank1,
            "baseline_untrained_mAP": untrained["qaconv"].mAP,
            "baseline_untrained_cosine_rank1": untrained["cosine"].rank1,
            "baseline_untrained_cosine_mAP": untrained["cosine"].mAP,
        }

    # ----------------------------------------------------------------------------------------- epochs

    def _plan(self) -> int:
        """How many epochs there are in all: as configured, or as many as the minutes allow at this pace."""
        now, minutes = time.perf_counter(), self.config.minutes
        if minutes is not None and self._turns:
            left = int((60 * minutes - (now - self._turns[0])) / (now - self._turns[-1]))
            total = min(self.config.epochs, self.progress.epoch + max(0, left))
            self.epochs = int(tell_all(self.world, str(total) if self.world.leads else None))
            self.learner.plan(self.sampler.steps * self.epochs)
        self._turns.append(now)
        return self.epochs

    def _epoch(self, epoch: int) -> None:
        checkpoint.seed_everything(self.config.seed, 1, epoch, self.world.rank)
        start, stalled = time.perf_counter(), self.neighbours.stall_seconds
        table = self.neighbours.refresh(epoch, self.model.classes)
        losses = self._train_on(epoch, table)
        self.neighbours.settle()  # a job that continues from the checkpoint needs what was pushed
        average_buffers(self.world, self.model)
        seconds = time.perf_counter() - start
        self._note(epoch, seconds, self._of_all(self.neighbours.stall_seconds - stalled), losses)
        every = self.config.evaluate.every
        if every and (epoch + 1) % every == 0 and epoch + 1 < self.epochs:
            self._judge(epoch)
        self._save()

    def _train_on(self, epoch: int, table: Table) -> dict[str, float]:
        """One epoch over a table; the mean of each loss over this epoch and all processes."""
        self.model.train()
        totals: dict[str, torch.Tensor] = {}
        batches, ahead = itertools.tee(self.sampler.batches(epoch, table))
        questions = (self._question(numbers, table) for numbers in ahead)
        this = next(questions, None)
        with self.report.bar(f"epoch {epoch + 1}/{self.epochs}", self.sampler.steps) as bar:
            for _, pixels in read_ahead(self.images, batches):
                assert this is not None
                upcoming = next(questions, None)
                losses = self.learner.learn(pixels, this.labels, this.neighbours, upcoming)
                this = upcoming
                for name, value in losses.items():
                    totals[name] = totals.get(name, torch.zeros_like(value)) + value
                bar.advance()
        means = torch.stack(list(totals.values())) / (self.sampler.steps * self.world.size)
        values = sum_over_ranks(self.world, means).tolist()
        if not all(map(math.isfinite, values)):
            raise ValueError(
                f"epoch {epoch}: the loss is not finite any more; lower optimise.rate or embedding.rate"
            )
        return dict(zip(totals, values, strict=True))

    def _question(self, numbers: Numbers, table: Table) -> Question:
        labels = self.labels[numbers]
        return Question(labels, torch.from_numpy(table[labels.numpy()]))

    def _note(self, epoch: int, seconds: float, stalls: list[float], losses: dict[str, float]) -> None:
        images = self.sampler.steps * self.sampler.batch_size * self.world.size
        generation, table_epoch = self.neighbours.generation, self.neighbours.table_epoch
        assert table_epoch is not None
        stalled = max(stalls)
        numbers = {"seconds": seconds, "refresh_stall_seconds": stalled, **losses}
        self.progress.epoch = epoch + 1
        self.progress.images += images
        self.progress.train_seconds += seconds
        of_ranks = {"refresh_stall_seconds_per_rank": stalls}
        self.progress.history.append({"epoch": epoch, "table_epoch": table_epoch, **numbers, **of_ranks})
        curves = {f"train/{name}": value for name, value in numbers.items()}
        self.report.numbers(epoch + 1, {**curves, "train/images_per_second": images / seconds})
        lag = epoch - table_epoch
        behind = f", {lag} epoch{'s' * (lag > 1)} behind" if lag else ""
        parts = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
        self.report.say(
            f"epoch {epoch + 1}/{self.epochs}: {parts}; {seconds:.1f} s, {images / seconds:.0f} "
            f"images/s, waited {stalled:.2f} s for generation {generation}{behind}"
        )

    # ------------------------------------------------------------------------------------------- end

    def _judge(self, epoch: int) -> dict[str, Retrieval]:
        with self.report.bar("judging unseen images", self.judge.my_queries) as bar:
            found = self.judge.features(self.model, bar.advance)
        for kind, result in found.items():
            self.report.numbers(epoch + 1, {f"{kind}/rank1": result.rank1, f"{kind}/mAP": result.mAP})
        qaconv, cosine = _line(found["qaconv"]), _line(found["cosine"])
        self.report.say(f"after epoch {epoch + 1}: {qaconv} (flattened cosine {cosine})")
        return found

    def _finish(self) -> dict[str, Any]:
        """Publishes the finished rows as one more generation, judges, and writes the metrics."""
        stalls = self._of_all(self.neighbours.stall_seconds)
        self.neighbours.publish(self.progress.epoch, self.model.classes)
        metrics = self._metrics(self._judge(self.progress.epoch - 1), stalls)
        if self.world.leads:
            write_json(self.config.out / METRICS, metrics)
        barrier(self.world)
        return metrics

    def _metrics(self, found: dict[str, Retrieval], stalls: list[float]) -> dict[str, Any]:
        done, qaconv, cosine = self.progress, found["qaconv"], found["cosine"]
        return {
            "rank1": qaconv.rank1,
            "rank5": qaconv.rank5,
            "rank10": qaconv.rank10,
            "mAP": qaconv.mAP,
            "cosine_rank1": cosine.rank1,
            "cosine_mAP": cosine.mAP,
            "queries": qaconv.queries,
            "queries_left_out": qaconv.left_out,
            **done.baselines,
            "train_seconds": done.train_seconds,
            "images_per_second": done.images / done.train_seconds,
            "refresh": self.config.refresh,
            "staleness": self.config.table_lag,
            "refresh_stall_seconds": max(stalls),
            "refresh_stall_seconds_per_rank": stalls,
            "epochs": done.epoch,
            "world_size": self.world.size,
            "device": self.world.device.type,
            "precision": str(self.model.precision).removeprefix("torch."),
            "num_classes": len(self.data.classes),
            "k": self.neighbours.k,
            "run": self.config.run,
            "generation": self.neighbours.generation,
            "history": done.history,
        }

    # ------------------------------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        stalls = self._of_all(self.neighbours.stall_seconds)
        tree = {
            "job": self._identity(),
            "images": self.data.digest,
            "model": dict(self.model.state_dict()),
            "learner": self.learner.state(),
            "progress": {
                **dataclasses.asdict(self.progress),
                "stall_seconds": stalls,
                "pushes": self.neighbours.pushes,
            },
        }
        path = self.config.out / CHECKPOINT
        shards.save(path, tree, self.progress.epoch, self.world, self.model.classes)

    def _load(self, path: Path) -> None:
        tree = shards.load(path)
        for name, mine in self._identity().items():
            if tree["job"].get(name) != mine:
                raise ValueError(
                    f"resume: {path} was made with another {name} ({tree['job'].get(name)}, now {mine}); "
                    "use the same, or --overwrite"
                )
        self._refuse_other_network(path, tree["model"])
        shards.restore_rows(path, tree, self.model.classes, self.learner.state()["row_optimiser"])
        self.model.load_state_dict(tree["model"])
        self.learner.restore(tree["learner"])
        self.progress = Progress(**tree["progress"])
        self.neighbours.pushes = dict(self.progress.pushes)
        stalls = self.progress.stall_seconds
        if len(stalls) == self.world.size:
            self.neighbours.stall_seconds = stalls[self.world.rank]
        elif self.world.leads:
            logger.info("resume: %d processes before, %d now: other batches", len(stalls), self.world.size)
        if tree.get("images", self.data.digest) != self.data.digest:
            logger.warning(
                "resume: the training images are not those that %s was trained on (other names, sizes or "
                "classes): going on with those there are now; --overwrite begins again",
                path,
            )
        self.report.say(f"continuing after epoch {self.progress.epoch} from {path}")

    def _refuse_other_network(self, path: Path, saved: dict[str, Any]) -> None:
        mine = self.model.state_dict()
        others = [name for name in {**mine, **saved} if not name.startswith(shards.TABLE)]
        differ = [n for n in others if n not in mine or n not in saved or mine[n].shape != saved[n].shape]
        if differ:
            raise ValueError(
                f"resume: {path} was made with another network ({len(differ)} of its parts differ, such as "
                f"{differ[0]}); use the same --model options, or --overwrite"
            )

    def _identity(self) -> dict[str, Any]:
        """What has to stay the same from one part of a job to the next."""
        names = hashlib.sha256("\n".join(self.data.classes).encode()).hexdigest()[:16]
        return {
            "set of classes": f"{len(self.data.classes)} named {names}",
            "feature map": list(self.model.classes.weight.shape[1:]),
            "embedding.keeping": self.config.embedding.keeping,
            "embedding.optimiser": self.config.embedding.optimiser,
        }

    def _of_all(self, seconds: float) -> list[float]:
        """Every process's number, in the order of ranks."""
        mine = torch.tensor([seconds], dtype=torch.float64)
        return [float(part[0]) for part in gather_rows(self.world, mine)]


def _line(result: Retrieval) -> str:
    if not result.queries:
        return "no query of the validation images has a match in the gallery"
    return f"rank-1 {result.rank1:.3f}, mAP {result.mAP:.3f}"
