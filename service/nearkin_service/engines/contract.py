"""What the rest of the service and the engines agree on: frozen values, and two small protocols.

Dimension letters: N classes, M present classes (M <= N), R elements of a row, D elements of a key, Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.ways import few

KeyName = Literal["flat", "pooled", "qaconv"]
NO_NEIGHBOUR = -1
"""The id where a class has no neighbour; its score is -inf."""
_MOST_IN_RESERVE = 16


def reserve_places(num_classes: int, k: int) -> int:
    """Neighbours after the k-th that an exact build notes for the update that may follow it.

    None of few classes: a full build takes a moment.
    """
    if few(num_classes):
        return 0
    return max(0, min(-(-k // 4), _MOST_IN_RESERVE, num_classes - 1 - k))


@dataclass(frozen=True, slots=True)
class LocationOptions:
    """What key "qaconv" can be told.

    Attributes:
        candidates: pooled candidates per class that are re-ranked; 0: the engine's default.
        weights: float32 [2 * H * W], one per location maximum, or empty for the mean of the maxima.
    """

    candidates: int = 0
    weights: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """How a table is to be built from rows.

    Attributes:
        row_shape: `(D,)` or `(C, H, W)`.
        key: what is compared.
        k: neighbours per class, 1 <= k <= N - 1.
        engine: an engine's name, or "auto".
        device: "auto", "cpu" or "cuda".
        absent: ids of classes without an embedding, int64, ascending, unique.
        qaconv: for key "qaconv" only.
        target_recall: what approximate engines tune themselves to, in (0, 1].
    """

    row_shape: tuple[int, ...]
    key: KeyName
    k: int
    engine: str
    device: str
    absent: NDArray[np.int64]
    qaconv: LocationOptions = field(default_factory=LocationOptions)
    target_recall: float = 0.99


@dataclass(frozen=True, slots=True)
class MeasuredRecall:
    """Recall of an approximate table on `sampled_rows` random rows, with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    sampled_rows: int


@dataclass(frozen=True, slots=True)
class BuiltTable:
    """A finished neighbour table and how it came about.

    Attributes:
        ids: int32 [N, k], highest score first, ties by the lower id; -1 where there is no neighbour.
        scores: float32 [N, k], inner products of normalised keys; -inf where there is no neighbour.
        engine: the engine that built it, never "auto".
        device: "cpu", "cuda" or "cuda x<count>".
        exact: whether the engine is exact.
        recomputed_rows: rows that needed the engine's second, exact path.
        stage_seconds: wall seconds by stage.
        versions: packages that took part.
        recall: approximate engines only.
        reserve: what follows the k-th place, [N, m], for a later update; -1 where that is not known.
    """

    ids: NDArray[np.int32]
    scores: NDArray[np.float32]
    engine: str
    device: str
    exact: bool
    recomputed_rows: int
    stage_seconds: Mapping[str, float]
    versions: Mapping[str, str]
    recall: MeasuredRecall | None = None
    reserve: Neighbours | None = None


class BuildMonitor(Protocol):
    """Told how far a build is; asked whether to go on."""

    def progress(self, stage: str, rows_done: int, rows_total: int) -> None:
        """Take note of progress. Called from the building thread, at most a few times a second."""

    def check(self) -> None:
        """Raise `BuildCancelled` if the build must stop. Called at least once a second."""


@dataclass(frozen=True, slots=True)
class Parent:
    """The generation before: its rows as pushed [N, R], its exact table [N, k], and its absent classes.

    `reserve` is what its build noted beyond the k-th places, if that is to be had.
    """

    rows: NDArray[Any]
    ids: NDArray[np.int32]
    scores: NDArray[np.float32]
    absent: NDArray[np.int64]
    reserve: Neighbours | None = None


class BuildCancelled(Exception):  # noqa: N818 - not an error: somebody asked for it
    """The build was cancelled or ran out of its time; the argument says which."""


class Searcher(Protocol):
    """Answers nearest-class queries on one generation's keys. Safe to call from several threads."""

    @property
    def memory_bytes(self) -> int:
        """What keeping this searcher costs."""

    def nearest_to_classes(self, classes: NDArray[np.int64], k: int) -> Neighbours:
        """The k nearest classes of each class, never itself; rows of absent classes are -1 / -inf."""

    def nearest_to_vectors(self, vectors_QR: NDArray[Any], k: int) -> Neighbours:
        """The k nearest classes of each vector, laid out like a row.

        ValueError names the first vector with NaN or Inf or without direction.
        """


@dataclass(frozen=True, slots=True)
class Neighbours:
    """ids int32 [Q, k] and scores float32 [Q, k], in the order of a neighbour table's rows."""

    ids: NDArray[np.int32]
    scores: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """One engine as the service reports it."""

    name: str
    available: bool
    reason: str
    exact: bool
