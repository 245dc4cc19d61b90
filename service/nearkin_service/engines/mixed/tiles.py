"""What a scan asks of keys in the type that tiles are multiplied in, and how far their products can be off.

Dimension letters: M keys, P keys and what pads them to whole blocks, B rows of a block.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.contract import BuildMonitor
from nearkin_service.engines.mixed.simd import WIDTH

_TILE_PRODUCTS = 1 << 35  # at most a fraction of a second per tile and thread
_TILE_ROWS = 512
_TILE_ROWS_NARROW = 1024
_LEAST_BLOCKS = 4  # so that threads have something to share


class Multiplier(Protocol):
    """Makes tiles, for one thread at a time: each thread that scans has its own."""

    def tile(self, upper: int, left: int) -> NDArray[np.int16]:
        """Values of the products of two blocks' keys [rows, B]; beyond the last key, none that count."""


class TileKeys(Protocol):
    """Keys in a type whose products are quick.

    Attributes:
        count: M.
        errors: float64 [P], by how much at most what a tile's value stands for differs from the true score,
            for this key and any other; in bfloat16 before the product is rounded.
        block: rows of a block; P is the least multiple of it that is M or more.
        rounding: how the tile's values are encoded.
    """

    count: int
    block: int

    @property
    def rounding(self) -> float: ...

    def prepare(self, monitor: BuildMonitor) -> None:
        """What must be done before errors are known and tiles are multiplied."""

    @property
    def errors(self) -> NDArray[np.float64]: ...

    def multiplier(self) -> Multiplier:
        """For one thread."""

    def computing(self) -> AbstractContextManager[None]:
        """While multipliers are used."""


def product_errors(lost_P: NDArray[np.float64], roundings: int) -> NDArray[np.float64]:
    """What a product can be off by, from the norm of what rounding took away from each key.

    With a = â + r and b = b̂ + q: |a·b - â·b̂| <= |â||q| + |r||b̂| + |r||q| (Cauchy-Schwarz), and a float32
    sum whose terms see so many roundings each, in any order, is off by at most that * 2**-24 * |â||b̂|.
    """
    most = float(lost_P.max(initial=0.0))
    length = 1 + 2.0**-20 + lost_P  # a float32 key is this long at most, and so is its rounded form
    longest = 1 + 2.0**-20 + most
    errors_P = (
        length * most + lost_P * longest + lost_P * most + (roundings + 8) * 2.0**-24 * length * longest
    )
    return np.asarray(errors_P * 1.001)


def blocks_of(count: int, size: int) -> tuple[int, int]:
    """Rows of a block, and of all blocks together."""
    block = _block_rows(count, size)
    return block, math.ceil(count / block) * block


def _block_rows(count: int, size: int) -> int:
    most = _TILE_ROWS if size >= 256 else _TILE_ROWS_NARROW
    while most > 64 and most * most * size > _TILE_PRODUCTS:
        most //= 2
    blocks = max(_LEAST_BLOCKS, math.ceil(count / most))
    return math.ceil(count / blocks / WIDTH) * WIDTH
