"""Keys in bfloat16, which processors with AMX multiply many times as fast as float32. Torch multiplies them.

Dimension letters: M keys, P keys padded to whole blocks, D elements of a key, E the same padded to 32, B rows
of a block.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numba import uint32
from numpy.typing import NDArray

from nearkin_service.engines.contract import BuildMonitor
from nearkin_service.engines.mixed.compiling import compiled_loosely
from nearkin_service.engines.mixed.simd import WIDTH
from nearkin_service.engines.mixed.tiles import blocks_of, product_errors
from nearkin_service.engines.mixed.values import ROUNDING
from nearkin_service.engines.workers import worker_count

_asking = threading.Lock()
_before: list[int] = []
_STRIP = 128  # rows of a tile on the diagonal, of which one half is copied from the other


class RoundedKeys:
    """Room for keys in bfloat16, to be put there block by block."""

    rounding = ROUNDING

    def __init__(self, count: int, size: int) -> None:
        self.count, self._size = count, size
        self.block, padded = blocks_of(count, size)
        self._bits_ME = np.empty((count, math.ceil(size / WIDTH) * WIDTH), np.uint16)
        self._bits_ME[:, size:] = 0
        self._lost_P = np.zeros(padded)

    def put(self, start: int, keys_BD: NDArray[np.float32]) -> None:
        """Keys from number `start` on."""
        some = slice(start, start + len(keys_BD))
        round_rows(keys_BD.view(np.uint32), keys_BD, self._bits_ME[some], self._lost_P[some])

    def prepare(self, monitor: BuildMonitor) -> None:
        """All there."""

    @property
    def errors(self) -> NDArray[np.float64]:
        """Once all are there: per key, what a product can be off by."""
        return product_errors(self._lost_P, self._size)

    def multiplier(self) -> _Multiplier:
        """For one thread."""
        return _Multiplier(self._bits_ME, self.block)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Torch uses one thread for each that multiplies, and as many as before afterwards.

        What it had before is asked for once: where another build is under way, it would answer 1. A thread
        that first uses torch then is given 1 too, and so is FAISS where both share one OpenMP.
        """
        import torch

        with _asking:
            if not _before:
                worker_count()
                _before.append(torch.get_num_threads())
        try:
            yield
        finally:
            torch.set_num_threads(_before[0])


class _Multiplier:
    def __init__(self, bits_ME: NDArray[np.uint16], block: int) -> None:
        import torch

        torch.set_num_threads(1)  # for this thread
        self._block = block
        self._values = torch.from_numpy(bits_ME.view(np.int16)).view(torch.bfloat16)
        self._tile = torch.empty((block, block), dtype=torch.bfloat16)
        self._bits_BB: NDArray[np.int16] = self._tile.view(torch.int16).numpy()

    def tile(self, upper: int, left: int) -> NDArray[np.int16]:
        """The tile's rows as bfloat16 bits, 0 beyond the last key."""
        import torch

        rows, columns = (self._values[at * self._block : (at + 1) * self._block] for at in (upper, left))
        used = self._tile[: len(rows), : len(columns)]
        if upper == left:
            self._multiply_by_strips(rows, used)
        else:
            torch.mm(rows, columns.T, out=used)
        self._bits_BB[:, len(columns) :] = 0
        return self._bits_BB[: len(rows)]

    def _multiply_by_strips(self, rows: Any, product: Any) -> None:
        """Products of rows with themselves: the lower half is the upper one's mirror image."""
        import torch

        for top in range(0, len(rows), _STRIP):
            end = top + _STRIP
            torch.mm(rows[top:end], rows[top:].T, out=product[top:end, top:])
            product[end:, top:end] = product[top:end, end:].T


@compiled_loosely
def round_rows(bits_MD: Any, keys_MD: Any, rounded_ME: Any, lost_M: Any) -> None:
    """bfloat16 (as uint16) of each key, to the nearest even; and the norm of what rounding took away.

    `bits_MD` is `keys_MD` seen as uint32. Elements under 1e-30 become 0: processors flush such products.
    """
    for row in range(keys_MD.shape[0]):
        bits_D, key_D, rounded_E = bits_MD[row], keys_MD[row], rounded_ME[row]
        total = 0.0
        for column in range(key_D.shape[0]):
            bits = bits_D[column]  # sums of uint32 are uint64 in numba, unless they are made uint32 at once
            odd = np.uint32(np.uint32(bits >> uint32(16)) & uint32(1))
            bits = np.uint32(np.uint32(bits + uint32(0x7FFF)) + odd)
            upper = np.uint32(bits >> uint32(16))
            upper = upper if abs(key_D[column]) > np.float32(1e-30) else uint32(0)
            rounded_E[column] = upper
            kept = np.uint32(upper << uint32(16)).view(np.float32)
            lost = np.float64(key_D[column]) - np.float64(kept)
            total += lost * lost
        lost_M[row] = np.sqrt(total) * (1 + 1e-6)
