"""The frozen values that wire, catalogue, store and builds hand to each other; checked when made."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

import ml_dtypes
import numpy as np

from nearkin_service.engines.contract import KeyName, LocationOptions, MeasuredRecall, reserve_places
from nearkin_service.errors import FailedPreconditionError, InvalidArgumentError
from nearkin_service.ranges import RowRange, RowSet

MAX_INT32, MAX_INT64 = 2**31 - 1, 2**63 - 1
RUN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def check_run_name(run: str) -> str:
    """The name itself. InvalidArgumentError: it is not a run's name."""
    if not RUN_NAME.fullmatch(run):
        raise InvalidArgumentError("run", f"{run[:80]!r} does not match [a-z0-9][a-z0-9._-]{{0,63}}")
    return run


@dataclass(frozen=True, slots=True)
class Retention:
    """What a run keeps. See the message of the same name in the protocol; 0 means the service's default."""

    keep_embeddings: int = 0
    keep_tables: int = 0
    keep_every: int = 0

    def __post_init__(self) -> None:
        for name in ("keep_embeddings", "keep_tables", "keep_every"):
            if getattr(self, name) < 0:
                raise InvalidArgumentError(f"retention.{name}", f"{getattr(self, name)} is negative")


@dataclass(frozen=True, slots=True)
class PushSpec:
    """What a push is of: the arguments on which all its ranks agree."""

    run: str
    epoch: int
    num_classes: int
    row_shape: tuple[int, ...]
    dtype: str
    k: int
    key: KeyName = "flat"
    engine: str = "auto"
    retention: Retention = field(default_factory=Retention)
    build_timeout: float | None = None
    qaconv_candidates: int = 0
    qaconv_weights: tuple[float, ...] = ()
    base_generation: int = 0  # rows that are not sent are taken from it; 0: every row is sent

    def __post_init__(self) -> None:
        check_run_name(self.run)
        if self.base_generation < 0:
            raise InvalidArgumentError("base_generation", f"{self.base_generation} is negative")
        if self.epoch < 0:
            raise InvalidArgumentError("epoch", f"{self.epoch} is negative")
        if not 2 <= self.num_classes <= MAX_INT32:
            raise InvalidArgumentError(
                "num_classes", f"{self.num_classes} is not in 2..{MAX_INT32} (ids are int32)"
            )
        if self.dtype not in DTYPES:
            raise InvalidArgumentError("dtype", f"{self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not 1 <= self.k <= self.num_classes - 1:
            raise InvalidArgumentError("k", f"{self.k} is not in 1..num_classes - 1 = {self.num_classes - 1}")
        self._check_row_shape()
        self._check_options()

    def _check_row_shape(self) -> None:
        if len(self.row_shape) not in (1, 3) or min(self.row_shape) < 1:
            raise InvalidArgumentError(
                "row_shape", f"{list(self.row_shape)} is neither [D] nor [C, H, W] of numbers >= 1"
            )
        if self.key != "flat" and len(self.row_shape) != 3:
            raise InvalidArgumentError(
                "key", f"{self.key!r} compares feature maps [C, H, W]; these rows are {list(self.row_shape)}"
            )

    def _check_options(self) -> None:
        if self.build_timeout is not None and not self.build_timeout > 0:
            raise InvalidArgumentError("build_timeout", f"{self.build_timeout} s is not positive")
        for name in ("qaconv_candidates", "qaconv_weights"):
            if self.key != "qaconv" and getattr(self, name):
                raise InvalidArgumentError(name, f"only for key 'qaconv', not for {self.key!r}")
        if self.qaconv_candidates < 0:
            raise InvalidArgumentError("qaconv_candidates", f"{self.qaconv_candidates} is negative")
        wanted = 2 * math.prod(self.row_shape[1:])
        if self.qaconv_weights and len(self.qaconv_weights) != wanted:
            raise InvalidArgumentError(
                "qaconv_weights", f"{len(self.qaconv_weights)} weights; 2 * H * W = {wanted} are needed"
            )
        if not all(map(math.isfinite, self.qaconv_weights)):
            raise InvalidArgumentError("qaconv_weights", "holds NaN or Inf")

    @property
    def qaconv(self) -> LocationOptions:
        """For the engines; means nothing for other keys."""
        return LocationOptions(self.qaconv_candidates, np.array(self.qaconv_weights, np.float32))

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return DTYPES[self.dtype]

    @property
    def row_elements(self) -> int:
        return math.prod(self.row_shape)

    @property
    def row_bytes(self) -> int:
        return self.row_elements * self.numpy_dtype.itemsize

    @property
    def rows_bytes(self) -> int:
        return self.num_classes * self.row_bytes

    @property
    def build_bytes(self) -> int:
        """Memory that building needs at the least: float32 keys (and maps, for qaconv), and the table."""
        elements = self.row_elements if self.key == "flat" else self.row_shape[0]
        if self.key == "qaconv":
            elements += self.row_elements
        return self.num_classes * elements * 4 + self.tables_bytes + self.reserve_bytes

    @property
    def tables_bytes(self) -> int:
        """Bytes of ids and scores together."""
        return self.num_classes * self.k * 8

    @property
    def reserve_bytes(self) -> int:
        """Bytes of what a build may note beside the embeddings for a later update, at most."""
        return self.num_classes * reserve_places(self.num_classes, self.k) * 8

    @property
    def expected_bytes(self) -> int:
        """Disk space that a push of this will take, once its table is there."""
        return self.rows_bytes + self.tables_bytes + self.reserve_bytes

    def rows_of(self, row_start: int, payload_bytes: int) -> RowRange:
        """The rows that a payload is. InvalidArgumentError: a partial row, or rows that there are not."""
        if payload_bytes == 0 or payload_bytes % self.row_bytes:
            raise InvalidArgumentError(
                "payload", f"{payload_bytes} bytes are not whole rows of {self.row_bytes} bytes, at least one"
            )
        stop = row_start + payload_bytes // self.row_bytes
        if row_start < 0 or stop > self.num_classes:
            raise InvalidArgumentError(
                "row_start", f"rows {row_start}..{stop - 1} are not within 0..{self.num_classes - 1}"
            )
        return RowRange(row_start, stop)

    def range_of(self, row_start: int, row_count: int) -> RowRange:
        """At least one row. InvalidArgumentError: there are no such rows."""
        if not (row_start >= 0 and 0 < row_count <= self.num_classes - row_start):
            raise InvalidArgumentError(
                "row_start",
                f"{row_count} rows from row {row_start} on are not within 0..{self.num_classes - 1}",
            )
        return RowRange(row_start, row_start + row_count)

    def difference(self, other: PushSpec) -> str:
        """The first field in which two pushes differ, with both values; "" if they are the same."""
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if mine != theirs:
                return f"{each.name} is {mine}, not {theirs}"
        return ""

    def to_document(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"row_shape": list(self.row_shape), "qaconv_weights": list(self.qaconv_weights)}

    @staticmethod
    def from_document(document: Mapping[str, Any]) -> PushSpec:
        return PushSpec(
            **{
                **document,
                "row_shape": tuple(document["row_shape"]),
                "qaconv_weights": tuple(document["qaconv_weights"]),
                "retention": Retention(**document["retention"]),
            }
        )


class PushState(StrEnum):
    OPEN = "open"
    BUILDING = "building"
    PUBLISHED = "published"
    FAILED = "failed"
    ABORTED = "aborted"


LIVE = frozenset({PushState.OPEN, PushState.BUILDING})


@dataclass(frozen=True, slots=True)
class PushView:
    """A push as it was at one moment. `complete`: every row has arrived or is declared absent."""

    push_id: str
    spec: PushSpec
    state: PushState
    stored: RowSet
    absent_count: int
    created: float
    complete: bool
    generation: int = 0
    error: str = ""


class EmbeddingsState(StrEnum):
    KEPT = "kept"
    FLUSHING = "flushing"
    DROPPED = "dropped"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class FileChecksums:
    """CRC32C of a table's file: of the whole, and of each block of `block_rows` rows."""

    block_rows: int
    whole: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReserveFile:
    """What `reserve.bin` holds: neighbours per class after the k-th, and the CRC32C of the file."""

    places: int
    crc32c: int


@dataclass(frozen=True, slots=True)
class Generation:
    """One published, immutable pair of embeddings and table. Times are seconds since 1970."""

    number: int
    spec: PushSpec
    push_id: str
    engine: str
    device: str
    exact: bool
    recomputed_rows: int
    absent_count: int
    published: float
    build_seconds: float
    stage_seconds: Mapping[str, float]
    versions: Mapping[str, str]
    ids: FileChecksums
    scores: FileChecksums
    absent_crc32c: int
    recall: MeasuredRecall | None = None
    reserve: ReserveFile | None = None
    embeddings: EmbeddingsState = EmbeddingsState.FLUSHING
    pinned: bool = False

    @property
    def run(self) -> str:
        return self.spec.run

    @property
    def epoch(self) -> int:
        return self.spec.epoch

    @property
    def has_embeddings(self) -> bool:
        return self.embeddings in (EmbeddingsState.KEPT, EmbeddingsState.FLUSHING)

    @property
    def bytes_on_disk(self) -> int:
        return self.spec.tables_bytes + (self.spec.rows_bytes + self.reserve_bytes) * self.has_embeddings

    @property
    def reserve_bytes(self) -> int:
        """Size of `reserve.bin`, which goes with the embeddings."""
        return self.spec.num_classes * self.reserve.places * 8 if self.reserve else 0

    def rows_of(self, row_start: int, row_count: int) -> RowRange:
        """The rows asked for; a count of 0 goes up to the last. InvalidArgumentError: there are none such."""
        stop = row_start + row_count if row_count else self.spec.num_classes
        if row_start < 0 or row_count < 0 or not row_start < stop <= self.spec.num_classes:
            raise InvalidArgumentError(
                "row_start" if not 0 <= row_start < self.spec.num_classes else "row_count",
                f"rows from {row_start}, {row_count} of them, are not within 0..{self.spec.num_classes - 1}",
            )
        return RowRange(row_start, stop)

    def require_embeddings(self) -> None:
        """FailedPreconditionError: they were dropped. Lost ones are the store's to report."""
        if self.embeddings is EmbeddingsState.DROPPED:
            raise FailedPreconditionError(
                f"the embeddings of generation {self.number} of run {self.run!r} were dropped by its "
                "retention (its table is still there); keep more with retention.keep_embeddings"
            )


@dataclass(frozen=True, slots=True)
class RunView:
    """A run as it was at one moment."""

    name: str
    created: float
    newest: Generation | None
    generations: int
    bytes_on_disk: int
    pushes: tuple[PushView, ...]


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """How far a build is; `seconds_left` is negative while nobody can say."""

    push_id: str
    epoch: int
    stage: str
    rows_done: int
    rows_total: int
    rows_per_second: float
    seconds_left: float


@dataclass(frozen=True, slots=True)
class GenerationRemoved:
    number: int


@dataclass(frozen=True, slots=True)
class RunRemoved:
    pass


RunEvent = RunView | PushView | BuildProgress | Generation | GenerationRemoved | RunRemoved


@dataclass(frozen=True, slots=True)
class Ending:
    """How a message ends whose rows are received as they come.

    Attributes:
        said: to be called once all are here: their CRC32C, and whether they are sound, as the sender says.
        looked: whether the sender has looked at them; then nobody else does, if they are.
    """

    said: Callable[[], tuple[int | None, bool]]
    looked: bool


@dataclass(frozen=True, slots=True)
class RecoveredPush:
    """A push as the data directory remembers it."""

    push_id: str
    spec: PushSpec
    created: float
    state: PushState
    stored: RowSet
    zeros: RowSet
    absent: RowSet
    vouched: RowSet
    commit_when_complete: bool
    error: str = ""


@dataclass(frozen=True, slots=True)
class RecoveredRun:
    """A run as the data directory remembers it. `last_generation` is the highest number ever given."""

    name: str
    created: float
    last_generation: int
    generations: tuple[Generation, ...]
    pushes: tuple[RecoveredPush, ...]
