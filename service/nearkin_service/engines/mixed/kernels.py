"""The compiled loops of engine `mixed`: sieving tiles, listing pairs. They run without the GIL.

Whatever a tile's values stand for, they are int16 that order like the products. They are sieved 32 at a time,
against a limit per row.

Dimension letters: B rows and C columns of a tile, G rows of a group, W places of the longest of these rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import uint32
from numpy.typing import NDArray

from nearkin_service.engines.mixed.compiling import compiled
from nearkin_service.engines.mixed.products import aligned
from nearkin_service.engines.mixed.simd import WIDTH, above, above_each, count_bits, first_bit, take
from nearkin_service.engines.mixed.values import CLOSED, VACANT, floor_of, limit_below

UNKNOWN = np.int32(-(2**31))
"""In place of a pair's exact score in steps of 2**-24."""


class Sieve(NamedTuple):
    """Per key: a limit, and the entries above it: a tile's value, and the other key's position.

    A key's entries lie in `values` and `ids` from its start on; there are `counts` of them, and `widths`
    places. When `rooms` of them are taken the row is pruned. A row that needs more places moves to where
    nobody's begin yet: of the memory that was asked for, only what is `taken` is ever touched. What values
    stand for can be off by the row's error, and a share `rounding` of itself; below `floor` they say nothing.
    """

    limits: NDArray[np.int16]
    counts: NDArray[np.int32]
    rooms: NDArray[np.int32]
    starts: NDArray[np.int64]
    widths: NDArray[np.int32]
    taken: NDArray[np.int64]
    values: NDArray[np.int16]
    ids: NDArray[np.int32]
    errors: NDArray[np.float64]
    rounding: float
    floor: np.int16

    @staticmethod
    def empty(width: int, places: int, errors: NDArray[np.float64], rounding: float) -> Sieve:
        """Sieves of this width that let pass what is above the floor, and places for all in which to grow."""
        rows = len(errors)
        places = max(places, rows * width)
        return Sieve(
            np.full(rows, floor_of(rounding)),
            np.zeros(rows, np.int32),
            np.full(rows, width, np.int32),
            np.arange(rows) * width,
            np.full(rows, width, np.int32),
            np.array([rows * width]),
            aligned((places,), np.int16),
            np.empty(places, np.int32),
            errors,
            rounding,
            floor_of(rounding),
        )


@compiled
def kth_largest(address: Any, count: Any, k: Any, floor: Any) -> Any:
    """The k-th largest of `count` int16 (a multiple of 32), or `floor` if it is not above that."""
    low, high = np.int64(floor), np.int64(CLOSED)
    while low < high:
        middle = (low + high + 1) // 2
        found = 0
        for place in range(0, count, WIDTH):
            found += count_bits(above(address + 2 * place, np.int16(middle - 1)))
        if found >= k:
            low = middle
        else:
            high = middle - 1
    return low


@compiled
def kth_entry(row: Any, k: Any, sieve: Any) -> Any:
    """The k-th largest value in a row's sieve, or the floor if it is not above that."""
    values, start, count = sieve.values, sieve.starts[row], sieve.counts[row]
    whole = (count + WIDTH - 1) // WIDTH * WIDTH
    values[start + count : start + whole] = VACANT
    return kth_largest(values[start:].ctypes.data, whole, k, sieve.floor)


@compiled
def drop(row: Any, k: Any, sieve: Any) -> None:
    """Drop from a row's sieve what can no longer be among its k best."""
    values, ids, start = sieve.values, sieve.ids, sieve.starts[row]
    count = sieve.counts[row]
    if sieve.limits[row] == CLOSED or count < k:
        return
    limit = limit_below(kth_entry(row, k, sieve), sieve.errors[row], sieve.rounding)
    kept = start
    for place in range(start, start + count):
        value = values[place]
        values[kept] = value
        ids[kept] = ids[place]
        kept += value > limit
    sieve.counts[row] = kept - start
    sieve.limits[row] = max(limit, sieve.limits[row])


@compiled
def move(row: Any, wanted: Any, sieve: Any) -> None:
    """Give a row so many places, if there are as many left; other threads may do the same."""
    _, counts, _, starts, _, _, values, ids, _, _, _ = sieve
    start, count = starts[row], counts[row]
    width = (min(wanted, sieve.limits.shape[0]) + WIDTH - 1) // WIDTH * WIDTH
    if width <= sieve.widths[row]:
        return
    to = take(sieve.taken.ctypes.data, width)
    if to + width > values.shape[0]:
        return
    values[to : to + count] = values[start : start + count]
    ids[to : to + count] = ids[start : start + count]
    sieve.starts[row] = to
    sieve.widths[row] = width


@compiled
def prune(row: Any, k: Any, sieve: Any) -> None:
    """Make room in a row's sieve; close the row if too much must remain."""
    if sieve.limits[row] == CLOSED:
        return
    drop(row, k, sieve)
    kept = sieve.counts[row]
    wanted = kept + kept // 2 + k + WIDTH
    if wanted > sieve.widths[row]:
        move(row, wanted + wanted // 2, sieve)
    width = sieve.widths[row]
    sieve.rooms[row] = min(width, wanted)
    if kept > width - width // 8 and width < sieve.limits.shape[0]:
        sieve.limits[row] = CLOSED


@compiled
def sieve_rows(tile_BC: Any, corner: tuple[int, int], seed: Any, k: Any, sieve: Any) -> None:
    """Offer a tile's entries to the sieves of its rows. With `seed`, begin with a limit from this tile.

    `corner` is the position of the tile's first row and first column among the keys.
    """
    first_row, first_column = corner
    limits, counts, rooms, starts, widths, _, values, ids, errors, rounding, floor = sieve
    columns = tile_BC.shape[1]
    for local in range(tile_BC.shape[0]):
        row = first_row + local
        address = tile_BC[local].ctypes.data
        if seed:
            kth = kth_largest(address, columns, k, floor)
            limits[row] = max(limits[row], limit_below(kth, errors[row], rounding))
            rooms[row] = min(widths[row], 3 * k + 2 * WIDTH)
        for start in range(0, columns, WIDTH):
            mask = above(address + 2 * start, limits[row])
            while mask != 0:
                column = start + first_bit(mask)
                mask = mask & (mask - uint32(1))
                if counts[row] == rooms[row]:
                    prune(row, k, sieve)
                value = tile_BC[local, column]
                if value > limits[row]:
                    place = starts[row] + counts[row]
                    values[place] = value
                    ids[place] = first_column + column
                    counts[row] += 1


@compiled
def sieve_columns(tile_BC: Any, corner: tuple[int, int], k: Any, sieve: Any) -> None:
    """Offer a tile's entries to the sieves of its columns: the other half of a symmetric matrix."""
    first_row, first_column = corner
    limits, counts, rooms, starts, _, _, values, ids, _, _, _ = sieve
    columns = tile_BC.shape[1]
    limits_address = limits[first_column:].ctypes.data
    for local in range(tile_BC.shape[0]):
        address = tile_BC[local].ctypes.data
        for start in range(0, columns, WIDTH):
            mask = above_each(address + 2 * start, limits_address + 2 * start)
            while mask != 0:
                column = start + first_bit(mask)
                mask = mask & (mask - uint32(1))
                row = first_column + column
                if counts[row] == rooms[row]:
                    prune(row, k, sieve)
                value = tile_BC[local, column]
                if value > limits[row]:
                    place = starts[row] + counts[row]
                    values[place] = value
                    ids[place] = first_row + local
                    counts[row] += 1


@compiled
def pack_rows(span: Any, k: Any, sieve: Any, packed_GW: Any) -> Any:
    """Drop from a range of sieves a last time, and pack their entries, id first.

    What is left of `packed_GW` stays as it was. Returns the largest number of entries.
    """
    most = 0
    for row in range(span[0], span[1]):
        drop(row, k, sieve)
        start, count, packed_G = sieve.starts[row], sieve.counts[row], packed_GW[row - span[0]]
        most = max(most, count)
        for place in range(count):
            value = np.int64(sieve.values[start + place]) & 0xFFFF
            packed_G[place] = np.int64(sieve.ids[start + place]) << 16 | value
    return most


@compiled
def unpack_rows(span: Any, packed_GW: Any, sieve: Any) -> None:
    """The reverse, once the packed entries are sorted."""
    for row in range(span[0], span[1]):
        packed_G, start = packed_GW[row - span[0]], sieve.starts[row]
        for place in range(sieve.counts[row]):
            sieve.ids[start + place] = packed_G[place] >> 16
            sieve.values[start + place] = np.int16(packed_G[place])


@compiled
def list_pairs(span: Any, wanted: Any, sieve: Any, done: Any) -> Any:
    """Where each row's pairs begin (int64 [rows + 1]), and the other key of each (int32).

    `wanted` is values that lie like the sieve's, and per row the least that matters. A pair is listed
    if its row wants it, it is not done, and the other row does not list it itself: that one does if it wants
    the pair and its sieve cannot have dropped it.
    """
    values, least = wanted
    limits, ids, counts = sieve.limits, sieve.ids, sieve.counts
    pair_starts = np.zeros(span[1] - span[0] + 1, np.int64)
    others = np.empty(counts[span[0] : span[1]].sum(), np.int32)
    pair = 0
    for row in range(span[0], span[1]):
        for place in range(sieve.starts[row], sieve.starts[row] + counts[row]):
            value = values[place]
            if value >= least[row] and done[place] == UNKNOWN:
                other = ids[place]
                if other > row or value < least[other] or sieve.values[place] <= limits[other]:
                    others[pair] = other
                    pair += 1
        pair_starts[row - span[0] + 1] = pair
    return pair_starts, others[:pair]


@compiled
def deliver(first_row: Any, pairs: Any, steps: Any, sieve: Any, done: Any) -> None:
    """Write each pair's score to its row's place, and to the other key's if that holds the pair too."""
    ids, counts, starts = sieve.ids, sieve.counts, sieve.starts
    pair_starts, others = pairs
    cursors = np.full(counts.shape[0], np.int64(-1))  # rows ascend, and so do the ids that a row lists
    for local in range(pair_starts.shape[0] - 1):
        row = first_row + local
        place = starts[row]
        for pair in range(pair_starts[local], pair_starts[local + 1]):
            other = others[pair]
            while ids[place] != other:
                place += 1
            done[place] = steps[pair]
            low, high = max(starts[other], cursors[other]), starts[other] + counts[other]
            if cursors[other] < 0:
                while low < high:
                    middle = (low + high) // 2
                    if ids[middle] < row:
                        low = middle + 1
                    else:
                        high = middle
            else:
                while low < high and ids[low] < row:
                    low += 1
            cursors[other] = low
            if low < starts[other] + counts[other] and ids[low] == row:
                done[low] = steps[pair]


@compiled
def known_scores(span: Any, sieve: Any, exact: Any, scores_GW: Any) -> Any:
    """Each row's known scores; what is left of `scores_GW` stays as it was. Returns the most of a row."""
    most = 0
    for row in range(span[0], span[1]):
        known, scores = 0, scores_GW[row - span[0]]
        for place in range(sieve.starts[row], sieve.starts[row] + sieve.counts[row]):
            if exact[place] != UNKNOWN:
                scores[known] = exact[place]
                known += 1
        most = max(most, known)
    return most


@compiled
def known_ranks(span: Any, sieve: Any, exact: Any, names_M: Any, ranks_GW: Any) -> Any:
    """The same of each row's ranks."""
    most = 0
    for row in range(span[0], span[1]):
        known, ranks = 0, ranks_GW[row - span[0]]
        for place in range(sieve.starts[row], sieve.starts[row] + sieve.counts[row]):
            if exact[place] != UNKNOWN:
                ranks[known] = (-np.int64(exact[place]) << 32) | np.int64(names_M[sieve.ids[place]])
                known += 1
        most = max(most, known)
    return most
