"""The keys of a build: kept, or, of long rows, made from the rows as often as they are needed.

Memory that a process touches for the first time can cost more than what is computed from it: on a virtual
machine a second and more per GiB.

Dimension letters: N classes, M keys, U of them, R elements of a row, D elements of a key, E of a part.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.contract import BuildMonitor
from nearkin_service.engines.keys import KeyedRows, fill_keys
from nearkin_service.engines.mixed.compiling import compiled
from nearkin_service.engines.mixed.products import aligned

WIDE = 2048
"""Elements from which on keys are scored part by part, and need not be kept."""


class Keys(Protocol):
    """Keys float32 [M, D], in whatever form they are held."""

    @property
    def shape(self) -> tuple[int, int]:
        """M, D."""

    def __getitem__(self, key: int) -> NDArray[np.float32]:
        """One key [D]."""

    def copy_part(
        self, used: NDArray[np.int64] | slice, columns: slice, part_UE: NDArray[np.float32]
    ) -> None:
        """Write some elements of the keys that are `used`, side by side."""

    def whole(self) -> NDArray[np.float32]:
        """All keys [M, D]."""


class KeptKeys:
    """Keys in memory."""

    def __init__(self, keys_MD: NDArray[np.float32]) -> None:
        self._keys_MD = keys_MD
        self.shape: tuple[int, int] = (len(keys_MD), keys_MD.shape[1])

    def __getitem__(self, key: int) -> NDArray[np.float32]:
        return np.asarray(self._keys_MD[key])

    def copy_part(
        self, used: NDArray[np.int64] | slice, columns: slice, part_UE: NDArray[np.float32]
    ) -> None:
        np.copyto(part_UE, self._keys_MD[used, columns])

    def whole(self) -> NDArray[np.float32]:
        return self._keys_MD


class ImpliedKeys:
    """Keys that are rows [N, R] in float32 times a factor each."""

    def __init__(self, source: KeyedRows, present: NDArray[np.int64], monitor: BuildMonitor) -> None:
        self._source, self._present, self._monitor = source, present, monitor
        self._all_there = len(present) == len(source.rows)
        self._whole: NDArray[np.float32] | None = None
        self.factors_M = np.empty(len(present))
        self.shape = (len(present), source.key_size)

    @staticmethod
    def possible(source: KeyedRows) -> bool:
        """Whether keys can be had from these rows like that."""
        return source.key == "flat" and source.rows.dtype == np.float32

    @staticmethod
    def suit(source: KeyedRows) -> bool:
        """Whether that is quicker than to keep them."""
        return ImpliedKeys.possible(source) and source.key_size >= WIDE

    def __getitem__(self, key: int) -> NDArray[np.float32]:
        row = self._source.rows[self._present[key]].astype(np.float64)
        return np.asarray(row * self.factors_M[key], np.float32)

    def copy_part(
        self, used: NDArray[np.int64] | slice, columns: slice, part_UE: NDArray[np.float32]
    ) -> None:
        rows = used if self._all_there else self._present[used]
        multiply_rows(as_read_only(self._source.rows[rows, columns]), self.factors_M[used], part_UE)

    def whole(self) -> NDArray[np.float32]:
        if self._whole is None:
            self._whole = aligned(self.shape, np.float32)
            fill_keys(self._whole, self._source, self._present, self._monitor)
        return self._whole


def as_read_only(rows_UE: NDArray[Any]) -> NDArray[Any]:
    """The same rows, of one type for the compiler, wherever they come from."""
    view_UE = rows_UE.view()
    view_UE.flags.writeable = False
    return view_UE


@compiled
def multiply_rows(rows_UE: Any, factors_U: Any, part_UE: Any) -> None:
    """Each row in float32 times its factor in float64, rounded once."""
    for row in range(rows_UE.shape[0]):
        row_E, factor, part_E = rows_UE[row], factors_U[row], part_UE[row]
        for column in range(row_E.shape[0]):
            part_E[column] = np.float32(np.float64(row_E[column]) * factor)
