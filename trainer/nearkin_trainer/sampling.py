"""Which images make a batch.

Every sampler takes P classes and K images of each. `ClassSampler` takes the classes at random; `GraphSampler`
takes a class and its nearest classes from the neighbour table, so that a batch is made of what is easily
confused (graph sampling: Liao and Shao, CVPR 2022, here without an N x N matrix).

The same (seed, epoch, rank) always gives the same batches, whatever else has been drawn before; the ranks'
batches together go through every class once before any class comes twice.

Legend: N classes, P classes per batch, K images per class, B = P * K.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nearkin_trainer.config import BatchConfig
from nearkin_trainer.distributed import World

logger = logging.getLogger("nearkin.trainer.sampling")

Indices = NDArray[np.int64]


class ImagesOfClasses:
    """The images of each class.

    Args:
        labels: int `[images]`, each in `0..num_classes-1`.
        num_classes: N; every class needs an image.
    """

    def __init__(self, labels: NDArray[np.int64], num_classes: int) -> None:
        order = np.argsort(labels, kind="stable")
        counts = np.bincount(labels, minlength=num_classes)
        if len(counts) != num_classes or counts.min(initial=1) == 0:
            raise ValueError(
                f"every class of 0..{num_classes - 1} needs at least one image, and no other label may occur"
            )
        self.num_classes = num_classes
        self._members = np.split(order, np.cumsum(counts)[:-1])

    def draw(self, class_id: int, count: int, random: np.random.Generator) -> Indices:
        """`count` images of a class: different ones as far as there are enough, then again from the start."""
        members = self._members[class_id]
        rounds = -(-count // len(members))
        return np.concatenate([random.permutation(members) for _ in range(rounds)])[:count]


class Sampler(Protocol):
    """The batches of one process."""

    steps: int
    batch_size: int

    def batches(self, epoch: int, neighbours: NDArray[np.int32]) -> Iterator[Indices]:
        """Image numbers of each batch of an epoch, int64 `[B]`; images of one class stand together.

        Args:
            epoch: which.
            neighbours: the epoch's table, int32 `[N, k]`, -1 = none.
        """
        ...


@dataclass(frozen=True)
class Turns:
    """Whose turn it is: one permutation of all classes after another, without end, dealt to the ranks.

    Args:
        num_classes: N.
        steps: batches per epoch and rank.
        seed: the sequence follows from it.
        rank: who asks.
        world_size: how many ranks take turns.
    """

    num_classes: int
    steps: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")

    def of_epoch(self, epoch: int, per_step: int) -> Indices:
        """This rank's classes of an epoch, int64 `[steps, per_step]`."""
        total = self.steps * self.world_size * per_step
        turns = self._places(epoch * total, total)
        return turns.reshape(self.steps, self.world_size, per_step)[:, self.rank]

    def random(self, epoch: int) -> np.random.Generator:
        """What this rank draws everything else of an epoch from."""
        return np.random.default_rng([self.seed, 2, epoch, self.rank])

    def _places(self, start: int, count: int) -> Indices:
        rounds = range(start // self.num_classes, -(-(start + count) // self.num_classes))
        turns = [np.random.default_rng([self.seed, 1, r]).permutation(self.num_classes) for r in rounds]
        offset = start - rounds.start * self.num_classes
        return np.concatenate(turns)[offset : offset + count]


class ClassSampler:
    """P classes in turn, K images each.

    Args:
        images: the images of each class.
        turns: whose turn it is.
        classes: P, at most N.
        images_per_class: K.
    """

    def __init__(self, images: ImagesOfClasses, turns: Turns, classes: int, images_per_class: int) -> None:
        if not 1 <= classes <= images.num_classes:
            raise ValueError(f"classes={classes} must be between 1 and the {images.num_classes} there are")
        if images_per_class < 1:
            raise ValueError(f"images_per_class={images_per_class} must be at least 1")
        self.steps, self.batch_size = turns.steps, classes * images_per_class
        self._images, self._turns = images, turns
        self._classes, self._images_per_class = classes, images_per_class

    def batches(self, epoch: int, neighbours: NDArray[np.int32] | None = None) -> Iterator[Indices]:
        """See `Sampler`; the neighbour table is not looked at."""
        random = self._turns.random(epoch)
        for turn in self._turns.of_epoch(epoch, self._classes):
            yield self._draw(self._filled(dict.fromkeys(turn.tolist()), random), random)

    def _filled(self, chosen: Iterable[int], random: np.random.Generator) -> list[int]:
        """P different classes: the chosen ones, and random others where they are too few."""
        classes = dict.fromkeys(chosen)
        if len(classes) < self._classes:
            # P different ones are enough, whichever are chosen already; listing all others would cost O(N).
            others = random.choice(self._images.num_classes, self._classes, replace=False)
            classes |= dict.fromkeys(others.tolist())
        return [*classes][: self._classes]

    def _draw(self, classes: Iterable[int], random: np.random.Generator) -> Indices:
        return np.concatenate([self._images.draw(c, self._images_per_class, random) for c in classes])


class GraphSampler(ClassSampler):
    """Neighbourhoods: classes in turn, each with some of its nearest classes, K images each.

    Args:
        images: the images of each class.
        turns: whose turn it is.
        classes: P.
        images_per_class: K.
        kin: classes per neighbourhood, its centre included; P / kin neighbourhoods make a batch. None: one.
        reach: the kin are drawn at random from this many nearest. None: they are the nearest.
    """

    def __init__(
        self,
        images: ImagesOfClasses,
        turns: Turns,
        classes: int,
        images_per_class: int,
        *,
        kin: int | None = None,
        reach: int | None = None,
    ) -> None:
        super().__init__(images, turns, classes, images_per_class)
        self._kin = min(classes, classes if kin is None else kin)
        self._reach = self._kin - 1 if reach is None else reach
        if self._kin < 1 or self._reach < self._kin - 1:
            raise ValueError(f"kin={kin} must be at least 1, and reach={reach} at least kin - 1")

    def batches(self, epoch: int, neighbours: NDArray[np.int32] | None = None) -> Iterator[Indices]:
        """See `Sampler`.

        Raises:
            ValueError: there is no table, or it has less than `reach` columns.
        """
        reach = min(self._reach, self._images.num_classes - 1)
        if neighbours is None or neighbours.shape[1] < reach:
            found = "no table" if neighbours is None else f"k={neighbours.shape[1]}"
            raise ValueError(f"graph sampling needs a neighbour table with k >= {reach}, not {found}")
        random = self._turns.random(epoch)
        for centres in self._turns.of_epoch(epoch, -(-self._classes // self._kin)):
            chosen: dict[int, None] = {}
            for centre in centres.tolist():
                nearest = neighbours[centre, :reach]
                self._add_kin(chosen, centre, nearest[nearest >= 0], random)
            yield self._draw(self._filled(list(chosen)[: self._classes], random), random)

    def _add_kin(
        self, chosen: dict[int, None], centre: int, nearest: NDArray[np.int32], random: np.random.Generator
    ) -> None:
        """Adds a class, and kin - 1 of its nearest that are not in the batch yet."""
        chosen[centre] = None
        if len(nearest) >= self._kin:
            nearest = random.permutation(nearest)
        fresh = [c for c in nearest.tolist() if c not in chosen]
        chosen.update(dict.fromkeys(fresh[: self._kin - 1]))


def make_sampler(
    config: BatchConfig, labels: NDArray[np.int64], num_classes: int, seed: int, world: World
) -> Sampler:
    """The configured sampler of this process; its batches are smaller where there are too few classes."""
    images = ImagesOfClasses(labels, num_classes)
    classes = min(config.classes, num_classes)
    if classes < config.classes and world.leads:
        logger.info("batch.classes=%d is more than there are; using %d", config.classes, classes)
    steps = config.steps or math.ceil(len(labels) / (classes * config.images * world.size))
    turns = Turns(num_classes, steps, seed, world.rank, world.size)
    if config.sampler == "classes":
        return ClassSampler(images, turns, classes, config.images)
    return GraphSampler(images, turns, classes, config.images, kin=config.kin, reach=config.reach)
