"""Scores of each sample against its own class and that class's neighbours, and no others.

B samples, k neighbours, N classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nearkin_trainer.matching.head import QAConv
from nearkin_trainer.matching.operation import location_maxima


@dataclass(frozen=True)
class SparseScores:
    """Scores of a batch against few classes.

    scores: float32 [B, 1 + k]; the own class first, then its neighbours; −inf where there is no class.
    classes: int64 [B, 1 + k]; −1 where there is none.
    """

    scores: Tensor
    classes: Tensor
    num_classes: int

    @property
    def mask(self) -> Tensor:
        """Bool [B, 1 + k]: where there is a class."""
        return self.classes >= 0

    def to_dense(self, fill: float = -torch.inf) -> Tensor:
        """[B, num_classes], `fill` for the classes that were not scored. For looking, not for every step."""
        dense_BX = self.scores.new_full((len(self.scores), self.num_classes + 1), fill)
        # Entries without a class land in one column too many, which is cut off.
        columns = torch.where(self.mask, self.classes, self.num_classes)
        return dense_BX.scatter(1, columns, self.scores)[:, : self.num_classes]


@runtime_checkable
class ClassTable(Protocol):
    """A class table that decides itself where the rows of a step come from."""

    shape: tuple[int, ...]

    def read(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """A tensor of rows [R, C, H, W], and in it the places of `candidates` (−1 stays −1)."""
        ...


class LearnableMaps(nn.Module):
    """The simplest class table: one learnable map per class, drawn from a normal distribution."""

    def __init__(self, num_classes: int, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, channels, height, width))


class SparseQAConv(nn.Module):
    """QAConv of a batch against the classes that the neighbour table names.

    Args:
        num_classes, channels, height, width: the shape of the class table.
        classes: a module whose `weight` is that table, or a `ClassTable`; by default learnable maps are made.
        head: the QAConv head to use, such as one shared with in-batch losses; by default one is made.
        backend: of `location_maxima`.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        height: int,
        width: int,
        *,
        classes: nn.Module | None = None,
        head: QAConv | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        shape = (num_classes, channels, height, width)
        self.classes = LearnableMaps(*shape) if classes is None else classes
        found = tuple(self.classes.shape if isinstance(self.classes, ClassTable) else self.table.shape)
        if found != shape:
            raise ValueError(f"classes.weight is {list(found)} and must be {list(shape)}")
        self.head = QAConv(height, width) if head is None else head
        self.num_classes, self.backend = num_classes, backend

    @property
    def table(self) -> Tensor:
        """The class maps [num_classes, C, H, W]; of a sharded table, those kept here."""
        table: Tensor = self.classes.weight  # type: ignore[assignment]
        return table

    def forward(self, features: Tensor, labels: Tensor, neighbours: Tensor) -> SparseScores:
        """Score `features` [B, C, H, W] of classes `labels` [B].

        neighbours: class ids, −1 = none; one row per sample [B, k], or the whole table [num_classes, k] of
        which the rows of `labels` are read. A neighbour that is the own class is left out.
        """
        classes_BM = self._candidates(labels, torch.as_tensor(neighbours))
        classes_BM = classes_BM.to(features.device)
        rows, places_BM = self.table, classes_BM
        if isinstance(self.classes, ClassTable):
            rows, places_BM = self.classes.read(classes_BM)
        maxima = location_maxima(features, rows, places_BM, self.backend)
        return SparseScores(self.head(maxima, classes_BM >= 0), classes_BM, self.num_classes)

    def _candidates(self, labels: Tensor, neighbours: Tensor) -> Tensor:
        labels = labels.to(neighbours.device)
        if neighbours.dim() != 2 or len(neighbours) not in (len(labels), self.num_classes):
            raise ValueError(
                f"neighbours must be [{len(labels)}, k], or the table [{self.num_classes}, k], "
                f"not {list(neighbours.shape)}"
            )
        rows_Bk = neighbours if len(neighbours) == len(labels) else neighbours[labels]
        rows_Bk = rows_Bk.to(torch.int64)
        own_B1 = labels.to(torch.int64)[:, None]
        return torch.cat([own_B1, torch.where(rows_Bk == own_B1, -1, rows_Bk)], dim=1)
