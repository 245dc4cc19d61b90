# ruff: noqa: PLR0917 (compiled functions take no keywords)
"""The products of a pair of maps, by tiles whose sums stay in registers.

In float32 a row of a map holds a channel, in fixed point two, each number of 32 bits a pair of int16.

P probe locations, Q class locations, C rows.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nearkin_trainer.matching.cpu.instructions import (
    FEW_VECTORS,
    LANES,
    LINE,
    MOST_VECTORS,
    ROWS,
    product_tile,
)
from nearkin_trainer.matching.cpu.layout import compiled, pace

Numbers = TypeVar("Numbers", NDArray[np.float32], NDArray[np.int32])


@compiled
def _parts(total: int, size: int) -> int:
    return (total + size - 1) // size


@compiled
def _cut(total: int, parts: int, index: int) -> int:
    """Where part `index` begins of parts that differ by one at most."""
    return total * index // parts


@compiled
def products(
    row: Numbers,
    panel: Numbers,
    columns: int,
    sims: Numbers,
    channel: int,
    steps: int,
    ahead: int,
    size: int,
) -> None:
    """Add some rows to sims [Q, columns] of a class [C, Q] and a panel [C, ≥ columns].

    From `ahead` on, `size` bytes are fetched.
    """
    locations, vectors = row.shape[1], columns // LANES
    a, b = row.ctypes.data + channel * row.strides[0], panel.ctypes.data + channel * panel.strides[0]
    high, wide = _parts(locations, ROWS), _parts(vectors, MOST_VECTORS)
    fetched = pace(size, steps * high * wide)
    for column in range(wide):
        first, end = _cut(vectors, wide, column), _cut(vectors, wide, column + 1)
        for part in range(high):
            q = _cut(locations, high, part)
            product_tile(
                sims[0, 0],
                _cut(locations, high, part + 1) - q,
                end - first,
                a + 4 * q,
                row.strides[0],
                b + first * LINE,
                panel.strides[0],
                (end - first - 1) * LINE,
                steps,
                sims.ctypes.data + q * sims.strides[0] + first * LINE,
                sims.strides[0],
                channel == 0,
                ahead,
                fetched,
            )
            ahead += fetched * steps


@compiled
def rest_products(
    row: Numbers, panel: Numbers, columns: int, sims: Numbers, channel: int, steps: int
) -> None:
    """Add some rows to sims [P − columns, Q] of the probe's locations beyond the columns; Q ≥ 16."""
    locations, count = row.shape[1], sims.shape[0]
    a = panel.ctypes.data + channel * panel.strides[0] + 4 * columns
    b = row.ctypes.data + channel * row.strides[0]
    vectors = _parts(locations, LANES)
    wide = _parts(vectors, FEW_VECTORS[count - 1])
    for column in range(wide):
        # The last tile has two vectors at least if there are two: none overlaps another tile's, which
        # would add to its sims again.
        first, end = _cut(vectors, wide, column), _cut(vectors, wide, column + 1)
        start = first * LANES
        product_tile(
            sims[0, 0],
            count,
            end - first,
            a,
            panel.strides[0],
            b + 4 * start,
            row.strides[0],
            4 * (min(end * LANES, locations) - LANES - start),
            steps,
            sims.ctypes.data + 4 * start,
            sims.strides[0],
            channel == 0,
            b,
            0,
        )
