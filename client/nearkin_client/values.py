"""What the client answers with: frozen values of our own, free of gRPC and protobuf.

Dimension letters: N classes, k neighbours, Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

KeyName = Literal["flat", "pooled", "qaconv"]
DTypeName = Literal["float32", "float16", "bfloat16"]
PushStateName = Literal["open", "building", "published", "failed", "aborted"]
EmbeddingsStateName = Literal["kept", "flushing", "dropped", "lost"]

NO_NEIGHBOUR = -1
"""The id where a class has no neighbour (it is absent); its score is -inf."""


@dataclass(frozen=True, slots=True, eq=False)
class NeighbourTable:
    """A neighbour table, or a range of its rows. The arrays are read-only: every rank has the same bytes.

    Attributes:
        ids: int32 [N, k], highest score first, ties by the lower id, never the class itself; -1: no
            neighbour.
        scores: float32 [N, k], inner products of L2-normalised keys, -inf where there is no neighbour;
            None if the table was read with `scores=False`.
        generation: its number within the run.
        epoch: the training epoch its embeddings came from.
        row_start: the class of row 0; greater than 0 when only a range was read.
    """

    ids: NDArray[np.int32]
    scores: NDArray[np.float32] | None
    generation: int
    epoch: int
    row_start: int = 0

    @property
    def k(self) -> int:
        """Neighbours per class."""
        return int(self.ids.shape[1])

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, eq=False)
class NearestClasses:
    """The nearest classes of each query, in the order of the queries.

    Attributes:
        ids: int32 [Q, k], highest score first, ties by the lower id; -1: none.
        scores: float32 [Q, k], -inf where there is none.
        generation: the generation that answered.
        epoch: its epoch.
    """

    ids: NDArray[np.int32]
    scores: NDArray[np.float32]
    generation: int
    epoch: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Recall:
    """Recall of an approximate table on `sampled_rows` random rows, with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    sampled_rows: int


@dataclass(frozen=True, slots=True)
class Retention:
    """What a run keeps from this push on. 0 is the service's own choice of each.

    Attributes:
        keep_embeddings: those of the last this many generations (0: 2).
        keep_tables: those of the last this many generations (0: all).
        keep_every: generations whose number is a multiple of this stay for good (0: none).
    """

    keep_embeddings: int = 0
    keep_tables: int = 0
    keep_every: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """One published, immutable pair of embeddings and table.

    Attributes:
        run: the run it belongs to.
        generation: its number, 1, 2, 3… within the run.
        epoch: the training epoch of its embeddings.
        num_classes: rows of the table.
        row_shape: `(D,)` or `(C, H, W)`.
        dtype: of the embeddings as they were pushed.
        k: neighbours per class.
        key: what was compared.
        engine: the engine that built it, never "auto".
        device: "cpu", "cuda" or "cuda x<count>".
        exact: whether that engine is exact.
        recall: measured recall; approximate engines only.
        recomputed_rows: rows that needed the engine's second, exact path.
        absent_count: classes without an embedding.
        published: when it became readable, UTC.
        build_seconds: wall seconds of the build; `stage_seconds` by stage.
        embeddings: whether the embeddings can still be queried.
        base_generation: the generation that rows not pushed were taken from, or None.
        ids_crc32c: of the table's ids, and `scores_crc32c` of its scores.
        versions: packages that took part in the build.
        pinned: exempt from retention.
        push_id: the push it came from.
    """

    run: str
    generation: int
    epoch: int
    num_classes: int
    row_shape: tuple[int, ...]
    dtype: DTypeName
    k: int
    key: KeyName
    engine: str
    device: str
    exact: bool
    recall: Recall | None
    recomputed_rows: int
    absent_count: int
    published: datetime
    build_seconds: float
    stage_seconds: Mapping[str, float]
    embeddings: EmbeddingsStateName
    base_generation: int | None
    ids_crc32c: int
    scores_crc32c: int
    versions: Mapping[str, str]
    pinned: bool
    push_id: str


@dataclass(frozen=True, slots=True)
class Push:
    """One epoch on its way.

    Attributes:
        push_id: its name on the wire; survives restarts of the service.
        run: the run, and `epoch` the epoch.
        state: how far it is.
        num_classes: rows it will have.
        row_bytes: bytes of a row.
        rows_stored: rows that arrived so far, from whichever rank.
        stored: the same as disjoint, ascending `(start, stop)` ranges.
        generation: its generation, once published.
        error: why, once failed.
        absent_count: classes declared absent.
        created: when it was begun, UTC.
    """

    push_id: str
    run: str
    epoch: int
    state: PushStateName
    num_classes: int
    row_bytes: int
    rows_stored: int
    stored: tuple[tuple[int, int], ...]
    generation: int | None
    error: str
    absent_count: int
    created: datetime


@dataclass(frozen=True, slots=True)
class Run:
    """One training job's name space.

    Attributes:
        run: its name.
        created: when, UTC.
        newest: its newest generation, or None before the first.
        generations: how many are kept.
        bytes_on_disk: what they take.
        pushes: those that are open or building.
    """

    run: str
    created: datetime
    newest: Generation | None
    generations: int
    bytes_on_disk: int
    pushes: tuple[Push, ...]


@dataclass(frozen=True, slots=True)
class ClassChange:
    """How one class changed between two generations.

    Attributes:
        class_id: the class.
        overlap: share of its neighbours in both tables, 0 to 1.
        movement: 1 - cosine of its row then and now; None when the embeddings are gone.
    """

    class_id: int
    overlap: float
    movement: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far neighbours and embeddings moved between two generations of a run.

    Attributes:
        base_generation: the earlier one.
        generation: the later one.
        k: neighbours compared per class.
        classes_compared: classes present in both.
        mean_overlap: mean over classes of the share of neighbours in both tables, 0 to 1.
        overlap_deciles: 11 values: minimum, 10 %, … maximum.
        mean_movement: mean of 1 - cosine(row then, row now); None when embeddings are gone.
        most_changed: classes with the least overlap, least first.
    """

    base_generation: int
    generation: int
    k: int
    classes_compared: int
    mean_overlap: float
    overlap_deciles: tuple[float, ...]
    mean_movement: float | None
    most_changed: tuple[ClassChange, ...]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """One engine of a service; `reason` says why it is not available, or when `auto` takes it."""

    name: str
    available: bool
    reason: str
    exact: bool


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A service: its version, engines, devices and limits.

    Attributes:
        version: of the service.
        started: when, UTC.
        engines: what can build tables.
        devices: what it can compute on.
        chunk_bytes: payload per bulk message that suits it.
        limits: every limit by name; 0 means none.
        features: capabilities added within v1, by name.
        versions: packages it runs on.
    """

    version: str
    started: datetime
    engines: tuple[EngineInfo, ...]
    devices: tuple[str, ...]
    chunk_bytes: int
    limits: Mapping[str, int]
    features: tuple[str, ...]
    versions: Mapping[str, str]


# ---------------------------------------------------------------------------------------- events of a run


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """The state of the run when watching began, or began again after the connection was lost."""

    time: datetime
    run: Run


@dataclass(frozen=True, slots=True)
class PushChanged:
    """A push was opened, received rows, was committed, published, failed or aborted."""

    time: datetime
    push: Push


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """How far a build is; `seconds_left` is None until it can be told."""

    time: datetime
    push_id: str
    epoch: int
    stage: str
    rows_done: int
    rows_total: int
    rows_per_second: float
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class GenerationPublished:
    """A generation became readable."""

    time: datetime
    generation: Generation


@dataclass(frozen=True, slots=True)
class GenerationRemoved:
    """A generation was deleted, by a person or by retention."""

    time: datetime
    generation: int


@dataclass(frozen=True, slots=True)
class RunRemoved:
    """The run was deleted with everything in it."""

    time: datetime


RunEvent: TypeAlias = (
    RunSnapshot | PushChanged | BuildProgress | GenerationPublished | GenerationRemoved | RunRemoved
)
