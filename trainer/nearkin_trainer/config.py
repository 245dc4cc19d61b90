"""Everything that can be set, checked when it is made. `nearkin-train --help` is made from this page.

The parts that belong to one module live next to it: `AugmentConfig`, `NeighbourConfig`, `WeightedLosses`.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nearkin_trainer.classes import Keeping, RowOptimiserName
from nearkin_trainer.data.augment import AugmentConfig
from nearkin_trainer.losses import WeightedLosses
from nearkin_trainer.neighbours import NeighbourConfig


def _at_least(config: object, lowest: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value >= lowest:
            raise ValueError(f"{name}={value} must be at least {lowest:g}")


@dataclass(frozen=True)
class ImageConfig:
    """How images are read.

    Args:
        height: pixels; every image is stretched to height x width.
        width: pixels.
        memory_gib: decoded images are kept in memory up to this size, one copy per machine.
        validation_share: share of the classes set aside when the data are class folders without a split.
    """

    height: int = 64
    width: int = 64
    memory_gib: float = 4.0
    validation_share: float = 0.2

    def __post_init__(self) -> None:
        _at_least(self, 8, "height", "width")
        _at_least(self, 0, "memory_gib", "validation_share")

    @property
    def memory_bytes(self) -> int:
        """`memory_gib` in bytes."""
        return int(self.memory_gib * 2**30)


@dataclass(frozen=True)
class ModelConfig:
    """The network.

    Args:
        backbone: `compact` for the built-in residual network, or `package.module:function` for your own:
            called without arguments, it returns an nn.Module from images [B, 3, height, width] to a feature
            map [B, C, H, W].
        channels: C of the compact network's feature map.
        width: channels of its first stage.
        blocks: residual blocks in each of its three stages.
        score_scale: spread of the scores that the untrained head gives; small scores learn slowly.
        precision: what convolutions compute in; `auto` is bfloat16 where that is known to be faster.
        matching: backend of the location-wise matching.
    """

    backbone: str = "compact"
    channels: int = 128
    width: int = 40
    blocks: int = 1
    score_scale: float = 4.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    matching: str = "auto"

    def __post_init__(self) -> None:
        if self.backbone != "compact" and not re.fullmatch(r"[\w.]+:\w+", self.backbone):
            raise ValueError(
                f"backbone={self.backbone!r} is neither 'compact' nor of the form package.module:function"
            )
        _at_least(self, 1, "channels", "width", "blocks")
        if not self.score_scale > 0:
            raise ValueError(f"score_scale={self.score_scale} must be more than 0")


@dataclass(frozen=True)
class CosineConfig:
    """In-batch softmax over the cosine of whole maps, beside the losses over QAConv scores.

    It costs almost nothing, and shapes the features that the location-wise score compares.

    Args:
        weight: of this loss in the sum; 0 leaves it out.
        scale: cosines are multiplied by this.
    """

    weight: float = 1.0
    scale: float = 20.0

    def __post_init__(self) -> None:
        _at_least(self, 0, "weight", "scale")


@dataclass(frozen=True)
class BatchConfig:
    """What a batch is made of; sizes are per process.

    Args:
        sampler: `graph` puts a class and its nearest classes together, `classes` takes classes at random.
        classes: classes per batch; fewer if there are fewer.
        images: images per class; classes with fewer repeat theirs.
        kin: `graph` only: classes per neighbourhood, classes / kin of which make a batch. By default one.
        reach: `graph` only: kin are drawn at random from this many nearest. By default they are the nearest.
        steps: batches per epoch and process; by default as many as there are images for.
    """

    sampler: Literal["graph", "classes"] = "graph"
    classes: int = 16
    images: int = 4
    kin: int | None = None
    reach: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, 2, "classes")
        _at_least(self, 1, "images")
        if self.steps is not None:
            _at_least(self, 1, "steps")
        if self.kin is not None and not 2 <= self.kin <= self.classes:
            raise ValueError(f"kin={self.kin} must be between 2 and classes={self.classes}")
        if self.reach is not None:
            _at_least(self, (self.kin or self.classes) - 1, "reach")

    @property
    def neighbours_needed(self) -> int:
        """How wide a neighbour table the sampler reads."""
        if self.sampler == "classes":
            return 0
        return self.reach or (self.kin or self.classes) - 1


@dataclass(frozen=True)
class EmbeddingConfig:
    """The class-embedding table.

    Args:
        keeping: `learnable` rows follow their gradient (needs a softmax or focal loss), `memory` rows follow
            the features of the batches.
        start: rows before the first epoch: `features` (means over each class's images) or `noise`.
        momentum: `memory` only: share of the old row that stays.
        optimiser: `learnable` only: row-wise `sgd`, `adagrad` or `adam`.
        rate: `learnable` only: learning rate of the rows, scaled by the schedule.
        sharded: each process keeps only its share of the rows, and their optimiser's state; rows travel to
            where a step reads them, while the network computes. For tables that one process has no room for.
            Results are the same.
        storage: what rows are stored as; `bfloat16` halves their memory. Updates are computed in float32.
        place: where rows and their optimiser's state lie: on the `device`; in `host` memory, for tables
            larger than the GPU; or in a nameless `file` in OUT that is mapped into memory, for tables larger
            than that too. Results are the same.
        device_cache_rows: `host` and `file` only: how many rows, and what their optimiser keeps for each, the
            device holds. Rows read again while they are there do not travel; more than a few steps read is
            enough to be useful.
    """

    keeping: Keeping = "learnable"
    start: Literal["features", "noise"] = "features"
    momentum: float = 0.5
    optimiser: RowOptimiserName = "adam"
    rate: float = 1e-3
    sharded: bool = False
    storage: Literal["float32", "bfloat16"] = "float32"
    place: Literal["device", "host", "file"] = "device"
    device_cache_rows: int = 16384

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must be at least 0 and below 1")
        _at_least(self, 0, "rate")
        _at_least(self, 1, "device_cache_rows")


@dataclass(frozen=True)
class OptimiseConfig:
    """How weights are learned (AdamW).

    Args:
        rate: highest learning rate of backbone and head.
        weight_decay: of the backbone's convolutions.
        schedule: `cosine` falls to zero, `constant` stays, `steps` falls to a tenth at 60 % and again at 85
            %.
        warmup: share of all steps in which the rate rises from zero.
        clip: gradients longer than this are shortened to it; 0 leaves them.
        beta1: how long AdamW remembers gradients.
        beta2: how long it remembers their squares.
    """

    rate: float = 2e-3
    weight_decay: float = 1e-2
    schedule: Literal["cosine", "constant", "steps"] = "cosine"
    warmup: float = 0.05
    clip: float = 5.0
    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self) -> None:
        _at_least(self, 0, "rate", "weight_decay", "clip")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} must be at least 0 and below 1")

    def factor(self, progress: float) -> float:
        """Share of the highest rate after `progress` (0 to 1) of all steps."""
        if progress < self.warmup:
            return progress / self.warmup
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "steps":
            return 1.0 if progress < 0.6 else 0.1 if progress < 0.85 else 0.01
        return 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))


@dataclass(frozen=True)
class EvaluateConfig:
    """When unseen images are judged.

    Args:
        every: epochs between evaluations; 0 is only at the end.
        baselines: before training, also judge raw pixels and the untrained network.
        batch: images at a time.
    """

    every: int = 0
    baselines: bool = False
    batch: int = 128

    def __post_init__(self) -> None:
        _at_least(self, 0, "every")
        _at_least(self, 1, "batch")


@dataclass(frozen=True)
class TrainConfig:
    """Train a network to recognise classes, each sample scored against its own class and the nearest ones.

    Args:
        data: CSV file (columns label,path,split,is_query,is_gallery and optionally camera; paths relative to
            the file; split is train or validation), folder in the Market-1501 layout, or folder with one
            folder per class.
        out: folder for metrics.json, checkpoint, TensorBoard files and class names.
        service: address of a running neighbour service (unix:///path or host:port); by default what
            NEARKIN_SERVICE holds, or else a private one, with its data in OUT/service.
        run_name: of the training job at the service; by default made from the name of OUT.
        epochs: passes over the training images.
        minutes: time for the epochs and for saving after each. Where it is too short for all, there are as
            many as the machine's pace allows, and the schedule ends with them. By default there is no limit.
        processes: worker processes to start on this machine (under torchrun: leave at 1).
        device: `auto` is CUDA where there is one.
        seed: everything random follows from it.
        refresh: `blocking` waits at the start of each epoch for the table of that epoch; `background` pushes,
            builds and fetches while training goes on, with the table of `staleness` epochs before.
        staleness: `background` only: by how many epochs the table lags behind.
        resume: continue from OUT's checkpoint if there is one.
        overwrite: replace what OUT and the service have of an earlier job.
        tensorboard: write TensorBoard files.
    """

    data: Path
    out: Path
    service: str | None = None
    run_name: str | None = None
    epochs: int = 20
    minutes: float | None = None
    processes: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    refresh: Literal["blocking", "background"] = "blocking"
    staleness: int = 1
    resume: bool = False
    overwrite: bool = False
    tensorboard: bool = True
    image: ImageConfig = field(default_factory=ImageConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    neighbour: NeighbourConfig = field(default_factory=NeighbourConfig)
    loss: WeightedLosses = field(default_factory=lambda: WeightedLosses(softmax=0.5, batch_softmax=1.0))
    cosine: CosineConfig = field(default_factory=CosineConfig)
    optimise: OptimiseConfig = field(default_factory=OptimiseConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        _at_least(self, 1, "epochs", "processes", "staleness")
        _at_least(self, 0, "seed")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes={self.minutes} must be more than 0")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite contradict each other: give one of them")
        if self.run_name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", self.run_name):
            raise ValueError(f"run_name={self.run_name!r} must match [a-z0-9][a-z0-9._-]{{0,63}}")
        if self.embedding.keeping == "learnable" and not self.loss.needs_sparse:
            raise ValueError(
                "embedding.keeping='learnable' needs loss.softmax or loss.focal above 0 (nothing else trains "
                "the class embeddings); or use embedding.keeping='memory'"
            )
        if self.neighbour.k < self.batch.neighbours_needed:
            raise ValueError(
                f"neighbour.k={self.neighbour.k} is less than the graph sampler reads "
                f"({self.batch.neighbours_needed}, from batch.reach, batch.kin or batch.classes)"
            )

    @property
    def run(self) -> str:
        """The run at the service."""
        if self.run_name is not None:
            return self.run_name
        name = re.sub(r"[^a-z0-9._-]+", "-", self.out.resolve().name.lower()).lstrip("._-")
        return name[:64] or "training"

    @property
    def table_lag(self) -> int:
        """By how many epochs the neighbour table lags behind: 0 when every epoch waits for its own."""
        return self.staleness if self.refresh == "background" else 0

    def plain(self) -> dict[str, Any]:
        """As dicts, numbers and strings, for people to read beside the results."""
        plain = _plain(dataclasses.asdict(self))
        assert isinstance(plain, dict)
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value
