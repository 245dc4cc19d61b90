"""How far neighbours and embeddings moved between two generations.

Dimension letters: N classes, k neighbours, b classes of a block, R elements of a row.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin_service.errors import DataLossError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from nearkin_service.operations.core import Core
from nearkin_service.store import IDS
from nearkin_service.values import EmbeddingsState, Generation, check_run_name

_BLOCK_ELEMENTS = 1 << 22
_MOST_LISTED = 10_000


@dataclass(frozen=True, slots=True)
class Comparison:
    """Classes present in both generations, and what became of each.

    Attributes:
        later, earlier: the two generations.
        k: neighbours compared.
        classes: int64 [M], ascending.
        overlap: float64 [M], |A ∩ B| / k, of as many neighbours as there are when they are fewer than k.
        movement: float64 [M], 1 - cosine(row then, row now); None when embeddings are gone.
        most_changed: positions in `classes`, least overlap first, then most movement, then the lower id.
    """

    later: Generation
    earlier: Generation
    k: int
    classes: NDArray[np.int64]
    overlap: NDArray[np.float64]
    movement: NDArray[np.float64] | None
    most_changed: NDArray[np.int64]


class Comparing:
    """Compares generations of one run."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def compare(self, run: str, later: int, earlier: int, k: int, listed: int) -> Comparison:
        """0 means: the newest; the one published before; the smaller k of the two; 10 classes.

        NotFoundError: no such run or generation. FailedPreconditionError: different numbers of classes.
        """
        found = self._core.catalogue.run(check_run_name(run))
        now = found.generation(later)
        then = found.generation(earlier) if earlier else found.before(now.number)
        if now.spec.num_classes != then.spec.num_classes:
            raise FailedPreconditionError(
                f"generation {then.number} has {then.spec.num_classes} classes and generation {now.number} "
                f"has {now.spec.num_classes}; only equal numbers can be compared"
            )
        most = min(now.spec.k, then.spec.k)
        if not 0 <= k <= most:
            raise InvalidArgumentError("k", f"{k} is not in 0..{most}, the smaller k of the two")
        if not 0 <= listed <= _MOST_LISTED:
            raise InvalidArgumentError("most_changed", f"{listed} is not in 0..{_MOST_LISTED}")
        return await self._core.compute(self._compare, now, then, k or most, listed or 10)

    def _compare(self, later: Generation, earlier: Generation, k: int, listed: int) -> Comparison:
        present = np.ones(later.spec.num_classes, bool)
        tables: list[NDArray[np.int32]] = []
        for generation in (later, earlier):
            with self._core.catalogue.kept(generation):
                present[self._core.directory.absent(generation)] = False
                tables.append(self._core.directory.map_column(generation, IDS)[:, :k])
        classes = np.flatnonzero(present)
        now, then = tables
        overlap = _by_blocks(lambda ids: _overlap(now[ids], then[ids]), classes, 2 * k)
        movement = self._movement(later, earlier, classes)
        order = np.lexsort((classes, np.zeros(len(classes)) if movement is None else -movement, overlap))
        return Comparison(later, earlier, k, classes, overlap, movement, order[:listed])

    def _movement(
        self, later: Generation, earlier: Generation, classes: NDArray[np.int64]
    ) -> NDArray[np.float64] | None:
        gone = not (later.has_embeddings and earlier.has_embeddings)
        if gone or later.spec.row_shape != earlier.spec.row_shape:
            return None
        try:
            now, then = (self._rows(generation) for generation in (later, earlier))
        except (FailedPreconditionError, NotFoundError, DataLossError):
            return None
        return _by_blocks(lambda ids: _moved(now[ids], then[ids]), classes, now.shape[1])

    def _rows(self, generation: Generation) -> NDArray[Any]:
        with self._core.catalogue.kept(generation):
            if self._core.directory.verify_rows(generation) is EmbeddingsState.LOST:
                raise DataLossError("lost")
            with closing(self._core.directory.open_rows(generation)) as file:
                return file.map()


def _by_blocks(measure: Any, classes: NDArray[np.int64], width: int) -> NDArray[np.float64]:
    step = max(1, _BLOCK_ELEMENTS // width)
    pieces = [measure(classes[at : at + step]) for at in range(0, len(classes), step)]
    return np.concatenate(pieces) if pieces else np.empty(0)


def _overlap(now_bk: NDArray[np.int32], then_bk: NDArray[np.int32]) -> NDArray[np.float64]:
    """An id that is in both rows stands twice, side by side, once they are sorted together."""
    both = np.sort(np.concatenate([now_bk, then_bk], axis=1), axis=1)
    shared = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum(axis=1)
    most = np.maximum((now_bk >= 0).sum(axis=1), (then_bk >= 0).sum(axis=1))
    return np.where(most > 0, shared / np.maximum(most, 1), 1.0)


def _moved(now_bR: NDArray[Any], then_bR: NDArray[Any]) -> NDArray[np.float64]:
    """Norms by the same sums as the products: a row that stayed the same has moved by 0."""
    now, then = now_bR.astype(np.float64), then_bR.astype(np.float64)
    norms = np.sqrt(np.vecdot(now, now) * np.vecdot(then, then))
    moved: NDArray[np.float64] = np.clip(1.0 - np.vecdot(now, then) / norms, 0.0, 2.0)
    return moved
