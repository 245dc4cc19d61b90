"""Rows as they were pushed become keys: what is compared, L2-normalised, float32.

A key depends on the values of its row alone, never on the row's place: equal rows get equal keys.

Dimension letters: N classes, M present classes (M <= N), R elements of a row, D elements of a key,
B rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.contract import BuildMonitor, KeyName
from nearkin_service.engines.pacing import Pace
from nearkin_service.engines.workers import in_threads

_BLOCK_ELEMENTS = 1 << 16  # half a MiB in float64
_SUMMED, _SUMMED_ROWS = 4096, 8  # a quarter of a MiB in float64
_ALONE = 1 << 22  # elements: so few are done before other threads are of help


@dataclass(frozen=True, slots=True)
class KeyedRows:
    """Rows as pushed, [N, R] in wire dtype, and what makes keys of them.

    Attributes:
        rows: [N, R]; those of absent classes hold undefined bytes.
        row_shape: `(D,)` or `(C, H, W)`; its product is R.
        key: what is compared. Key "qaconv" finds its candidates by the pooled key.
        absent: ids of classes without an embedding.
    """

    rows: NDArray[Any]
    row_shape: tuple[int, ...]
    key: KeyName
    absent: NDArray[np.int64]

    @property
    def key_size(self) -> int:
        """Elements of one key."""
        return math.prod(self.row_shape) if self.key == "flat" else self.row_shape[0]

    def present(self) -> NDArray[np.int64]:
        """The ids of classes that have an embedding, ascending."""
        mask = np.ones(len(self.rows), bool)
        mask[self.absent] = False
        return np.flatnonzero(mask)

    def keys_of(
        self, block_BR: NDArray[Any], names: NDArray[np.int64], what: str = "class"
    ) -> NDArray[np.float32]:
        """The keys of some rows, float32 [B, D]; `what` and `names` tell in errors whose row is at fault.

        Raises:
            ValueError: a row holds NaN or Inf or has no direction.
        """
        keys_BD = np.empty((len(block_BR), self.key_size), np.float32)
        self.write_keys(keys_BD, block_BR, names, what)
        return keys_BD

    def write_keys(
        self, keys_BD: NDArray[np.float32], block_BR: NDArray[Any], names: NDArray[np.int64], what: str
    ) -> None:
        """`keys_of`, in place.

        Norms are float64, so that rows of 1e30 and of 1e-40 are as good as any.
        """
        values = block_BR.astype(np.float64, order="C")
        if self.key != "flat":
            values = values.reshape(len(values), self.row_shape[0], -1).mean(axis=2)
        values *= self._factors(values, names, what)[:, None]
        keys_BD[:] = values

    def factors_of(self, block_BR: NDArray[Any], names: NDArray[np.int64]) -> NDArray[np.float64]:
        """By what rows must be multiplied to become keys "flat"."""
        return self._factors(block_BR, names, "class")

    def _factors(self, values_BD: NDArray[Any], names: NDArray[np.int64], what: str) -> NDArray[np.float64]:
        norms = np.sqrt(_squared_lengths(values_BD))
        bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
        if len(bad):
            raise ValueError(f"{what} {names[bad[0]]}: {self._fault(float(norms[bad[0]]))}")
        return np.asarray(1 / norms)

    def _fault(self, norm: float) -> str:
        if norm != 0:
            return "its row holds NaN or Inf; send finite values or declare the class absent"
        subject = "row" if self.key == "flat" else "mean over its locations"
        return f"its {subject} is zero and has no direction; declare the class absent"


def rows_at_once(row_size: int) -> int:
    """Of which keys are made at a time, so that they stay in a core's own cache."""
    return max(1, _BLOCK_ELEMENTS // max(1, row_size))


def _squared_lengths(values_BD: NDArray[Any]) -> NDArray[np.float64]:
    """Each row's, the same bits wherever it lies: einsum would cut sums of more than 8,192 by place.

    They become float64 part by part, while the part is in a core's cache.
    """
    lengths_B = np.zeros(len(values_BD))
    step = max(_SUMMED_ROWS, _SUMMED_ROWS * _SUMMED // values_BD.shape[1])
    for top in range(0, len(values_BD), step):
        some = slice(top, top + step)
        for left in range(0, values_BD.shape[1], _SUMMED):
            part = values_BD[some, left : left + _SUMMED].astype(np.float64, order="C", copy=False)
            lengths_B[some] += np.einsum("bd,bd->b", part, part)
    return lengths_B


def fill_keys(
    keys_MD: NDArray[np.float32], source: KeyedRows, present: NDArray[np.int64], monitor: BuildMonitor
) -> None:
    """Write the keys of the present classes, in the order given, into `keys_MD`, block by block."""
    each_block(
        source,
        present,
        lambda start, ids, block_BR: source.write_keys(
            keys_MD[start : start + len(ids)], block_BR, ids, "class"
        ),
        monitor,
    )


def each_block(
    source: KeyedRows,
    present: NDArray[np.int64],
    work: Callable[[int, NDArray[np.int64], NDArray[Any]], Any],
    monitor: BuildMonitor,
    multiple: int = 1,
) -> None:
    """Hand the rows of present classes to `work` in blocks: the first one's place, their ids, themselves.

    Blocks begin at a `multiple` of rows, and hold some.
    """
    pace = Pace(monitor, "keys", len(present))
    step = math.ceil(rows_at_once(source.rows.shape[1]) / multiple) * multiple
    whole = np.array_equal(present, np.arange(len(source.rows)))

    def do(start: int) -> None:
        ids = present[start : start + step]
        work(start, ids, source.rows[start : start + step] if whole else source.rows[ids])

    if len(present) * source.key_size <= _ALONE:
        for start in range(0, len(present), step):
            do(start)
    else:
        in_threads(do, range(0, len(present), step), lambda done: pace.done(done * step))
    pace.done(len(present))
