"""Scores of each sample against its own class and that class's neighbours, and no others.

B samples, k neighbours, N classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nearkin_trainer.matching.head import QAConv
from nearkin_trainer.matching.operation import location_maxima

Neighbours = Tensor | NDArray[np.int32]
OneRowPer = Literal["sample", "class"]


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

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        neighbours: Neighbours,
        *,
        one_row_per: OneRowPer | None = None,
    ) -> SparseScores:
        """Score `features` [B, C, H, W] of classes `labels` [B].

        neighbours: class ids, −1 = none; one row per sample [B, k], or the whole table [num_classes, k] of
        which the rows of `labels` are read. A neighbour that is the own class is left out.
        one_row_per: which of the two it is; needed only where there are as many samples as classes.

        Raises `ValueError` for labels that are no class ids, and for neighbours that are neither of the two.
        """
        self._check(labels)
        classes_BM = _own_first(labels, self._rows(labels, neighbours, one_row_per)).to(features.device)
        rows, places_BM = self.table, classes_BM
        if isinstance(self.classes, ClassTable):
            rows, places_BM = self.classes.read(classes_BM)
        maxima = location_maxima(features, rows, places_BM, self.backend)
        return SparseScores(self.head(maxima, classes_BM >= 0), classes_BM, self.num_classes)

    def _check(self, labels: Tensor) -> None:
        if labels.dim() != 1 or labels.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"labels must be int64 class ids [B], not {labels.dtype} {list(labels.shape)}")
        if len(labels) and labels.device.type == "cpu":  # others would have to be waited for
            low, high = (int(bound) for bound in torch.aminmax(labels))
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"labels must lie in [0, {self.num_classes - 1}], found {low if low < 0 else high}"
                )

    def _rows(self, labels: Tensor, neighbours: Neighbours, one_row_per: OneRowPer | None) -> Tensor:
        """The neighbours of each sample [B, k]."""
        neighbours = neighbours if isinstance(neighbours, Tensor) else np.asarray(neighbours)
        shape = list(neighbours.shape)
        lengths = {"sample": len(labels), "class": self.num_classes}
        readings = [each for each, length in lengths.items() if len(shape) == 2 and shape[0] == length]
        if one_row_per is not None:
            readings = [each for each in readings if each == one_row_per]
        rows = [
            _class_ids(neighbours if each == "sample" else _take(neighbours, labels)) for each in readings
        ]
        if not rows:
            raise ValueError(
                f"neighbours must be [{len(labels)}, k], or the table [{self.num_classes}, k], not {shape}"
            )
        if len(rows) == 2 and not torch.equal(*rows):
            raise ValueError(
                f"neighbours {shape} may have a row per sample or one per class, as there are {shape[0]} of "
                "both: say which with one_row_per='sample' or one_row_per='class'"
            )
        return rows[0]


def _take(neighbours: Neighbours, labels: Tensor) -> Neighbours:
    if isinstance(neighbours, Tensor):
        return neighbours[labels.to(neighbours.device)]
    rows: NDArray[np.int32] = neighbours[labels.numpy(force=True)]
    return rows


def _class_ids(neighbours: Neighbours) -> Tensor:
    """int64; of an array a copy, since PyTorch warns of those that are read-only, as the client's are."""
    tensor = neighbours if isinstance(neighbours, Tensor) else torch.from_numpy(neighbours.copy())
    if tensor.is_floating_point():
        raise ValueError(f"neighbours must be integers, not {tensor.dtype}")
    return tensor.to(torch.int64)


def _own_first(labels: Tensor, neighbours_Bk: Tensor) -> Tensor:
    own_B1 = labels.to(neighbours_Bk.device, torch.int64)[:, None]
    return torch.cat([own_B1, torch.where(neighbours_Bk == own_B1, -1, neighbours_Bk)], dim=1)
