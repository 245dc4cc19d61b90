"""What a whole neighbour table tells about its classes.

Dimension letters: N classes, k neighbours, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nearkin_client.errors import InvalidArgument
from nearkin_client.values import NeighbourTable


@dataclass(frozen=True, slots=True)
class NearestPairs:
    """Pairs of classes of which one is the other's nearest, most alike first, ties by the lower ids.

    Attributes:
        first, second: int32 [P], class ids, `first` the lower one.
        scores: float32 [P], inner products of the normalised keys.
        mutual: bool [P], whether each is the other's nearest.
    """

    first: NDArray[np.int32]
    second: NDArray[np.int32]
    scores: NDArray[np.float32]
    mutual: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.first)

    def first_few(self, most: int) -> list[tuple[int, int, float, bool]]:
        """The two classes, the score and whether it is mutual, of at most so many."""
        columns = (self.first, self.second, self.scores, self.mutual)
        return list(zip(*(column[:most].tolist() for column in columns), strict=True))

    def from_score(self, least: float) -> NearestPairs:
        """Those that are at least so much alike."""
        count = int((self.scores >= least).sum())
        return NearestPairs(self.first[:count], self.second[:count], self.scores[:count], self.mutual[:count])


def nearest_pairs(table: NeighbourTable) -> NearestPairs:
    """The pairs of a whole table. Classes that are one under two ids come out on top.

    Raises:
        InvalidArgument: the table is only a part of one, or was read without scores.
    """
    _require_whole(table)
    if table.scores is None:
        raise InvalidArgument("table: its scores are needed; read it with scores=True", field="table")
    own = np.flatnonzero(table.ids[:, 0] >= 0)
    other = table.ids[own, 0]
    keys = np.minimum(own, other) * len(table) + np.maximum(own, other)
    keys, places, times = np.unique(keys, return_index=True, return_counts=True)
    scores = table.scores[own[places], 0]
    order = np.lexsort((keys, -scores))
    first, second = np.divmod(keys[order], len(table))
    return NearestPairs(first.astype(np.int32), second.astype(np.int32), scores[order], times[order] == 2)


def times_listed(table: NeighbourTable) -> NDArray[np.int64]:
    """In how many rows each class is a neighbour [N]: those in very many are hubs, those in none orphans.

    Raises:
        InvalidArgument: the table is only a part of one.
    """
    _require_whole(table)
    return np.bincount(table.ids[table.ids >= 0], minlength=len(table))


def _require_whole(table: NeighbourTable) -> None:
    if table.row_start or table.ids.max(initial=-1) >= len(table):
        raise InvalidArgument("table: all of its rows are needed, not a part", field="table")
