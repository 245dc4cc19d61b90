"""Keys in fixed point: int16 times a factor of the key's own. Their products are summed in int32, exactly.

A key is cut into parts of 512 elements. Its factor is the least for which no element exceeds an int16, and no
part is longer than the root of 2**31: then no product of two parts, nor any share of it, exceeds an int32.

Dimension letters: M keys, P keys padded to whole blocks, D elements of a key, B of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.contract import BuildMonitor
from nearkin_service.engines.mixed.blocks import (
    LANES,
    add_group_products,
    put_group_products,
    put_group_sums,
)
from nearkin_service.engines.mixed.compiling import compiled, compiled_loosely
from nearkin_service.engines.mixed.products import aligned
from nearkin_service.engines.mixed.tiles import Multiplier, blocks_of, product_errors
from nearkin_service.engines.mixed.values import FIXED, STEPS, VACANT

PART = 512
_LARGEST = 32766.0
_LONGEST = 46327.0  # float32 takes 0.8 from the sum, rounding elements adds 11.4 at most: less than 2**15.5


class FixedKeys:
    """Room for keys in fixed point, to be put there group by group.

    They lie part by part: [parts, groups, pairs of elements, 16 keys, 2]; the last part has fewer pairs.
    """

    rounding = FIXED

    def __init__(self, count: int, size: int, at_once: int | None = None) -> None:
        """`at_once` of a key's elements have a place; all, if it is not given."""
        self.count, self._size = count, size
        self.block, padded = blocks_of(count, size)
        held = size if at_once is None else at_once
        groups = math.ceil(count / LANES)
        self._packed = aligned((groups * LANES * (held + held % 2),), np.int16)
        self._factors_P = np.zeros(padded, np.float32)
        self._squares_P = np.zeros(padded)  # of what rounding took away

    def put(self, start: int, keys_BD: NDArray[np.float32]) -> None:
        """Keys from number `start` on: up to the last, or a multiple of 16 that begins at one."""
        self._note(start, keys_BD)
        self._pack(start, keys_BD)

    def _note(self, start: int, keys_BD: NDArray[np.float32]) -> None:
        note_factors(keys_BD, keys_BD.view(np.int32), self._factors_P[start : start + len(keys_BD)])

    def _pack(self, start: int, keys_BE: NDArray[np.float32]) -> None:
        """Some elements of keys whose factors are known."""
        some = slice(start, start + len(keys_BE))
        groups = math.ceil(self.count / LANES)
        notes = self._factors_P[some], self._squares_P[some]
        pack_keys(keys_BE, (start // LANES, groups), self._packed, notes)

    def prepare(self, monitor: BuildMonitor) -> None:
        """All there."""

    @property
    def errors(self) -> NDArray[np.float64]:
        """Once all are there: per key, what a value can be off by."""
        # To float32, the parts' sum, two scales, one key's scale.
        roundings = math.ceil(self._size / PART) + 4
        lost_P = np.sqrt(self._squares_P) * (1 + 1e-6)
        return product_errors(lost_P, roundings) + 0.5001 / STEPS

    def multiplier(self) -> Multiplier:
        """For one thread."""
        shape = (self.block, self.block) if self._size > PART else (0, 0)
        sums_BB = aligned(shape, np.float32)
        return FixedMultiplier(self._tiles(self._size), lambda upper, left: sums_BB, begun=False)

    def _tiles(self, size: int) -> Tiles:
        scales = self._factors_P, self._factors_P * np.float32(STEPS)
        return Tiles(self._packed, scales, (self.count, size), self.block)

    def computing(self) -> AbstractContextManager[None]:
        """Nothing to prepare."""
        return nullcontext()


class Room(NamedTuple):
    """For a tile: sums, unless keys have one part only, and values; whether sums begin and end here."""

    sums: NDArray[np.float32]
    tile: NDArray[np.int16]
    begin: bool
    end: bool


class Tiles(NamedTuple):
    """What tiles are made of: packed keys, what rows and columns are scaled by, M and D, and B."""

    packed: NDArray[np.int16]
    scales: tuple[NDArray[np.float32], NDArray[np.float32]]
    shape: tuple[int, int]
    block: int

    def multiply(self, at: tuple[int, int], room: Room) -> None:
        """Two blocks, given by their numbers."""
        corner = at[0] * self.block // LANES, at[1] * self.block // LANES
        multiply_blocks(self.packed, self.scales, self.shape, corner, room)


class FixedMultiplier:
    """Of keys in fixed point."""

    def __init__(
        self, tiles: Tiles, sums_of: Callable[[int, int], NDArray[np.float32]], *, begun: bool
    ) -> None:
        """`sums_of` two blocks are [B, B], and have `begun` with other elements or not."""
        self._tiles, self._sums_of, self._begun = tiles, sums_of, begun
        self._tile_BB = aligned((tiles.block, tiles.block), np.int16)

    def tile(self, upper: int, left: int) -> NDArray[np.int16]:
        """The products of two blocks' keys in steps, and `VACANT` beyond the last key."""
        count, block = self._tiles.shape[0], self._tiles.block
        rows, columns = (min(block, count - at * block) for at in (upper, left))
        room = Room(self._sums_of(upper, left), self._tile_BB, not self._begun, end=True)
        self._tiles.multiply((upper, left), room)
        self._tile_BB[:, columns:] = VACANT
        return self._tile_BB[:rows]


@compiled
def note_factors(keys_BD: Any, bits_BD: Any, factors: Any) -> None:
    """Of each key; `bits_BD` is the keys seen as int32."""
    for row in range(keys_BD.shape[0]):
        factors[row] = factor_of(keys_BD[row], bits_BD[row])


@compiled_loosely
def pack_keys(keys_BE: Any, first: Any, packed: Any, notes: Any) -> None:
    """Pack keys from the first of two numbers of groups on; the other is how many groups there are in all.

    `notes` are the keys' factors, and sums to which the squares of what rounding takes away are added.
    """
    count, size = keys_BE.shape
    factors, squares = notes
    steps = np.zeros((LANES, PART), np.int16)
    for top in range(0, count, LANES):
        here = min(LANES, count - top)
        start = 0
        for left in range(0, size, PART):
            wide = min(PART, size - left)
            steps[:] = 0
            for local in range(here):
                row = top + local
                part = keys_BE[row, left : left + wide]
                squares[row] += count_in(part, np.float64(factors[row]), steps[local])
            pairs = (wide + 1) // 2
            place = start + (first[0] + top // LANES) * pairs * 2 * LANES
            interleave(steps, packed[place : place + pairs * 2 * LANES])
            start += first[1] * pairs * 2 * LANES


@compiled_loosely
def factor_of(key: Any, bits: Any) -> Any:
    """The least float32 that a key's elements can be counted in; `bits` is the key seen as int32."""
    largest, longest = np.int32(0), np.float32(0)
    for column in range(bits.shape[0]):
        largest = max(largest, np.int32(bits[column] & np.int32(0x7FFFFFFF)))
    for left in range(0, key.shape[0], PART):
        part, total = key[left : left + PART], np.float32(0)
        for column in range(part.shape[0]):
            total += part[column] * part[column]
        longest = max(longest, total)
    most = np.float64(np.int32(largest).view(np.float32))
    return np.float32(max(most / _LARGEST, np.sqrt(np.float64(longest)) / _LONGEST))


@compiled_loosely
def count_in(part: Any, factor: Any, steps: Any) -> Any:
    """A part's elements as whole numbers of its factor; what is lost, squared and summed."""
    scale, total = 1 / factor, 0.0
    for column in range(part.shape[0]):
        value = np.float64(part[column])
        whole = np.rint(value * scale)
        steps[column] = np.int16(np.int32(whole))
        away = value - whole * factor
        total += away * away
    return total


@compiled
def interleave(steps: Any, packed: Any) -> None:
    """Pairs of elements of 16 keys side by side."""
    place = 0
    for pair in range(packed.shape[0] // (2 * LANES)):
        for local in range(LANES):
            packed[place] = steps[local, 2 * pair]
            packed[place + 1] = steps[local, 2 * pair + 1]
            place += 2


@compiled
def address_of(array: Any) -> Any:
    """As int64: numba adds unsigned numbers to others in float64."""
    return np.int64(array.ctypes.data)


@compiled
def multiply_blocks(packed: Any, scales: Any, shape: Any, corner: Any, room: Any) -> None:
    """A tile's values; `corner` is its first row's and first column's group.

    `shape` is that of the packed keys. There are values only where sums end. On the diagonal one half is
    copied from the other.
    """
    (count, size), (upper, left), (sums_BB, tile_BB, begins, ends) = shape, corner, room
    groups, block = (count + LANES - 1) // LANES, tile_BB.shape[0] // LANES
    rows, columns = min(block, groups - upper), min(block, groups - left)
    base, last = address_of(packed), (size - 1) // PART * PART
    owners, others = address_of(scales[0]), address_of(scales[1])
    stride = np.int64(tile_BB.shape[1])
    for begin in range(0, size, PART):
        pairs = (min(PART, size - begin) + 1) // 2
        each = pairs * 4 * LANES
        for column in range(columns):
            for row in range(column + 1 if upper == left else rows):
                pair = base + (upper + row) * each, base + (left + column) * each, pairs
                place = LANES * (row * stride + column)
                values = address_of(tile_BB) + 2 * place, 2 * stride
                both = owners + 4 * LANES * (upper + row), others + 4 * LANES * (left + column)
                if last == 0 and begins and ends:
                    put_group_products(pair, both, values)
                else:
                    sums = address_of(sums_BB) + 4 * place, 4 * stride
                    add_group_products(pair, sums, begins and begin == 0)
                    if ends and begin == last:
                        put_group_sums(sums, both, values)
        base += groups * each
    if upper == left and ends:
        for row in range(LANES * rows):
            for column in range(row // LANES * LANES):
                tile_BB[row, column] = tile_BB[column, row]
