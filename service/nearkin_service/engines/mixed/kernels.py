"""The compiled loops of engine `mixed`: rounding, sieving tiles, scoring pairs. They run without the GIL.

A bfloat16 that is not negative orders like its bits read as int16. Tiles are sieved in that form, 32 entries
at a time, against a limit per row that is never negative: zero padding and negative similarities never pass.

Dimension letters: M keys, D elements of a key, B rows and C columns of a tile, P pairs, W places in a sieve's
row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import uint32
from numpy.typing import NDArray

from nearkin_service.engines.mixed.compiling import compiled, compiled_loosely
from nearkin_service.engines.mixed.simd import WIDTH, above, above_each, count_bits, first_bit

ROUNDING = 2.0**-8 * 1.01
"""Rounding a sum to bfloat16 moves it by at most this share of the result."""
CLOSED = np.int16(32767)
"""The limit of a row whose sieve overflowed: nothing passes any more."""
VACANT = np.int16(-32768)
UNKNOWN = np.int32(-(2**31))
"""In place of a pair's exact score in steps of 2**-24."""
_ONE = np.int16(0x3F90)  # a little above 1.0 in bfloat16


class Sieve(NamedTuple):
    """Per key: a limit, and the entries above it: bfloat16 bits as int16, and the other key's position.

    `rooms` is how many entries a row may hold before it is pruned. `fine` is the product that a value was
    rounded from; it can be off by the row's error and a share `rounding` of itself.
    """

    limits: NDArray[np.int16]
    counts: NDArray[np.int32]
    rooms: NDArray[np.int32]
    values: NDArray[np.int16]
    ids: NDArray[np.int32]
    errors: NDArray[np.float64]
    fine: NDArray[np.float32]
    rounding: float

    @staticmethod
    def empty(width: int, errors: NDArray[np.float64], rounding: float) -> Sieve:
        """Sieves that let every positive entry pass."""
        rows = len(errors)
        return Sieve(
            np.zeros(rows, np.int16),
            np.zeros(rows, np.int32),
            np.full(rows, width, np.int32),
            np.empty((rows, width), np.int16),  # pages that no entry reaches are never touched
            np.empty((rows, width), np.int32),
            errors,
            np.empty((rows, width), np.float32),
            rounding,
        )


@compiled_loosely
def round_rows(bits_MD: Any, keys_MD: Any, rounded_ME: Any, error_M: Any) -> None:
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
        error_M[row] = np.sqrt(total) * (1 + 1e-6)


@compiled
def kth_largest(address: Any, count: Any, k: Any) -> Any:
    """The k-th largest of `count` int16 (a multiple of 32), or 0 if it is not positive."""
    low, high = 0, int(_ONE)
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
    """The k-th largest value in a row's sieve, or 0 if it is not positive."""
    values, count = sieve.values[row], sieve.counts[row]
    whole = (count + WIDTH - 1) // WIDTH * WIDTH
    values[count:whole] = VACANT
    return kth_largest(values.ctypes.data, whole, k)


@compiled
def limit_below(kth: Any, error: Any) -> Any:
    """The limit under which nothing can still belong to the k best, given a k-th best value so far."""
    value = np.int32(np.int32(kth) << np.int32(16)).view(np.float32)
    least = (value * (1 - ROUNDING) - 2 * error) / (1 + ROUNDING)
    if least <= 0:
        return np.int16(0)
    bits = np.float32(least).view(np.int32) >> 16
    return np.int16(max(np.int32(0), bits - np.int32(1)))


@compiled
def prune(row: Any, k: Any, sieve: Any) -> None:
    """Drop from a row's sieve what can no longer be among its k best; close the row if too much remains."""
    values, ids, fine = sieve.values, sieve.ids, sieve.fine
    width = values.shape[1]
    count = sieve.counts[row]
    if sieve.limits[row] == CLOSED or count < k:
        return
    kth = kth_entry(row, k, sieve)
    limit = limit_below(kth, sieve.errors[row])
    kept = 0
    for place in range(count):
        if values[row, place] > limit:
            values[row, kept] = values[row, place]
            ids[row, kept] = ids[row, place]
            fine[row, kept] = fine[row, place]
            kept += 1
    sieve.counts[row] = kept
    sieve.limits[row] = max(limit, sieve.limits[row])
    sieve.rooms[row] = min(width, kept + kept // 2 + k + WIDTH)
    if kept > width - width // 8:
        sieve.limits[row] = CLOSED


@compiled
def fine_value(fine_BC: Any, local: Any, column: Any, value: Any) -> Any:
    """The product that was rounded to `value`, or that itself if `fine_BC` is empty."""
    if fine_BC.shape[0] > 0:
        return fine_BC[local, column]
    return np.int32(np.int32(value) << np.int32(16)).view(np.float32)


@compiled
def sieve_rows(tiles: Any, corner: tuple[int, int], seed: Any, k: Any, sieve: Any) -> None:
    """Offer a tile's entries to the sieves of its rows. With `seed`, begin with a limit from this tile.

    `tiles` is the tile in bfloat16 bits, and the products that it was rounded from or an empty array;
    `corner` is the position of the tile's first row and first column among the keys.
    """
    tile_BC, fine_BC = tiles
    first_row, first_column = corner
    limits, counts, rooms, values, ids, errors, fine, _ = sieve
    columns = tile_BC.shape[1]
    for local in range(tile_BC.shape[0]):
        row = first_row + local
        address = tile_BC[local].ctypes.data
        if seed:
            limits[row] = max(limits[row], limit_below(kth_largest(address, columns, k), errors[row]))
            rooms[row] = min(values.shape[1], 3 * k + 2 * WIDTH)
        for start in range(0, columns, WIDTH):
            mask = above(address + 2 * start, limits[row])
            while mask != 0:
                column = start + first_bit(mask)
                mask = mask & (mask - uint32(1))
                if counts[row] == rooms[row]:
                    prune(row, k, sieve)
                value = tile_BC[local, column]
                if value > limits[row]:
                    values[row, counts[row]] = value
                    ids[row, counts[row]] = first_column + column
                    fine[row, counts[row]] = fine_value(fine_BC, local, column, value)
                    counts[row] += 1


@compiled
def sieve_columns(tiles: Any, corner: tuple[int, int], k: Any, sieve: Any) -> None:
    """Offer a tile's entries to the sieves of its columns: the other half of a symmetric matrix."""
    tile_BC, fine_BC = tiles
    first_row, first_column = corner
    limits, counts, rooms, values, ids, _, fine, _ = sieve
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
                    values[row, counts[row]] = value
                    ids[row, counts[row]] = first_row + local
                    fine[row, counts[row]] = fine_value(fine_BC, local, column, value)
                    counts[row] += 1


@compiled
def pack_rows(span: Any, k: Any, sieve: Any, packed_GW: Any) -> Any:
    """Prune a range of sieves a last time, and pack their entries, id first.

    What is left of `packed_GW` stays as it was. Returns the largest number of entries.
    """
    fine, ids, counts = sieve.fine, sieve.ids, sieve.counts
    most = 0
    for row in range(span[0], span[1]):
        prune(row, k, sieve)
        most = max(most, counts[row])
        packed_G = packed_GW[row - span[0]]
        for place in range(counts[row]):
            packed_G[place] = np.int64(ids[row, place]) << 32 | np.int64(
                np.float32(fine[row, place]).view(np.int32)
            )
    return most


@compiled
def unpack_rows(span: Any, packed_GW: Any, sieve: Any) -> None:
    """The reverse, once the packed entries are sorted. Values are cut now: none is above what it was."""
    for row in range(span[0], span[1]):
        packed_G, ids, values, fine = (
            packed_GW[row - span[0]],
            sieve.ids[row],
            sieve.values[row],
            sieve.fine[row],
        )
        for place in range(sieve.counts[row]):
            bits = np.int32(packed_G[place] & 0x7FFFFFFF)
            ids[place] = packed_G[place] >> 32
            fine[place] = bits.view(np.float32)
            values[place] = np.int16(bits >> 16)


@compiled
def list_pairs(span: Any, wanted: Any, sieve: Any, done_MW: Any) -> Any:
    """Where each row's pairs begin (int64 [rows + 1]), and the other key of each (int32).

    `wanted` is values [M, W] like the sieve's fine ones, and per row the least that matters. A pair is listed
    if its row wants it, it is not done, and the other row does not list it itself: that one does if it wants
    the pair and its sieve cannot have dropped it.
    """
    values, least = wanted
    limits, ids, counts = sieve.limits, sieve.ids, sieve.counts
    starts = np.zeros(span[1] - span[0] + 1, np.int64)
    others = np.empty(counts[span[0] : span[1]].sum(), np.int32)
    pair = 0
    for row in range(span[0], span[1]):
        for place in range(counts[row]):
            value = values[row, place]
            if value >= least[row] and done_MW[row, place] == UNKNOWN:
                other = ids[row, place]
                if other > row or value < least[other] or sieve.values[row, place] <= limits[other]:
                    others[pair] = other
                    pair += 1
        starts[row - span[0] + 1] = pair
    return starts, others[:pair]


@compiled
def deliver(first_row: Any, pairs: Any, steps: Any, sieve: Any, done_MW: Any) -> None:
    """Write each pair's score to its row, and to the other key's row if that holds the pair too."""
    ids, counts = sieve.ids, sieve.counts
    starts, others = pairs
    cursors = np.full(ids.shape[0], -1, np.int32)  # rows ascend, and so do the ids that a row lists
    for local in range(starts.shape[0] - 1):
        row = first_row + local
        place = 0
        for pair in range(starts[local], starts[local + 1]):
            other = others[pair]
            while ids[row, place] != other:
                place += 1
            done_MW[row, place] = steps[pair]
            low, high = max(0, cursors[other]), counts[other]
            if cursors[other] < 0:
                while low < high:
                    middle = (low + high) // 2
                    if ids[other, middle] < row:
                        low = middle + 1
                    else:
                        high = middle
            else:
                while low < high and ids[other, low] < row:
                    low += 1
            cursors[other] = low
            if low < counts[other] and ids[other, low] == row:
                done_MW[other, low] = steps[pair]


@compiled
def known_ranks(span: Any, sieve: Any, exact_MW: Any, names_M: Any, ranks_GW: Any) -> None:
    """Each row's ranks of the pairs with an exact score; what is left of `ranks_GW` stays as it was."""
    for row in range(span[0], span[1]):
        known, ids, exact, ranks = 0, sieve.ids[row], exact_MW[row], ranks_GW[row - span[0]]
        for place in range(sieve.counts[row]):
            if exact[place] != UNKNOWN:
                ranks[known] = (-np.int64(exact[place]) << 32) | np.int64(names_M[ids[place]])
                known += 1
