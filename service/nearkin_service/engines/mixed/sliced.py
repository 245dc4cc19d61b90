"""Long keys in fixed point, a slice of their elements at a time, and the sums of all tiles.

Packed keys would be most of the memory that such a build touches, and that can cost more than what is
computed from it. Of few keys the sums are less.

Dimension letters: M keys, E elements of a slice, B keys of a block, T tiles.
"""

from __future__ import annotations

import math
import threading

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.contract import BuildMonitor
from nearkin_service.engines.mixed.blocks import LANES
from nearkin_service.engines.mixed.fixed import PART, FixedKeys, FixedMultiplier, Room
from nearkin_service.engines.mixed.held import ImpliedKeys
from nearkin_service.engines.mixed.products import aligned
from nearkin_service.engines.mixed.tiles import Multiplier
from nearkin_service.engines.pacing import Pace
from nearkin_service.engines.workers import in_threads

_SLICES = 8
_WORTH_SLICING = 1 << 25  # elements of all keys
_PACKED_AT_ONCE = 2 * LANES  # keys


class SlicedKeys(FixedKeys):
    """Keys of which `put` notes the factors; they are packed, slice by slice, once they all are known."""

    def __init__(self, keys: ImpliedKeys) -> None:
        count, size = keys.shape
        self._keys, self._slice = keys, math.ceil(size / PART / _SLICES) * PART
        super().__init__(count, size, self._slice)
        blocks = math.ceil(count / self.block)
        pairs = [(upper, left) for left in range(blocks) for upper in range(left + 1)]
        self._places = {pair: place for place, pair in enumerate(pairs)}
        self._sums_TBB = aligned((len(pairs), self.block, self.block), np.float32)

    @staticmethod
    def suit(count: int, size: int) -> bool:
        """Whether that touches less memory: sums take less than half of what packed keys would."""
        return 2 * count <= size and count * size >= _WORTH_SLICING

    def put(self, start: int, keys_BD: NDArray[np.float32]) -> None:
        """See `FixedKeys`."""
        self._note(start, keys_BD)

    def prepare(self, monitor: BuildMonitor) -> None:
        """Add up the products of all slices but the last, which is packed."""
        tiles = sorted(self._places, key=lambda at: at[0] == at[1])  # those that take half as long come last
        pace = Pace(monitor, "products", self.count)
        lefts = range(0, self._size, self._slice)
        for number, left in enumerate(lefts):
            width = min(self._slice, self._size - left)
            self._pack_slice(slice(left, left + width), monitor)
            if number < len(lefts) - 1:
                self._add_slice(tiles, width, begins=left == 0, monitor=monitor)
            pace.done(self.count * (number + 1) // len(lefts))

    def _pack_slice(self, columns: slice, monitor: BuildMonitor) -> None:
        local = threading.local()

        def pack(start: int) -> None:
            if not hasattr(local, "part"):
                local.part = aligned((_PACKED_AT_ONCE * self._slice,), np.float32)
            some = slice(start, min(self.count, start + _PACKED_AT_ONCE))
            count, width = some.stop - start, columns.stop - columns.start
            part_BE = local.part[: count * width].reshape(count, width)
            self._keys.copy_part(some, columns, part_BE)
            self._pack(start, part_BE)

        in_threads(pack, range(0, self.count, _PACKED_AT_ONCE), lambda done: monitor.check())

    def _add_slice(
        self, pairs: list[tuple[int, int]], width: int, *, begins: bool, monitor: BuildMonitor
    ) -> None:
        tiles, no_tile = self._tiles(width), aligned((self.block, self.block), np.int16)

        def add(at: tuple[int, int]) -> None:
            tiles.multiply(at, Room(self._sums_of(*at), no_tile, begins, end=False))

        in_threads(add, pairs, lambda done: monitor.check())

    def _sums_of(self, upper: int, left: int) -> NDArray[np.float32]:
        return np.asarray(self._sums_TBB[self._places[upper, left]])

    def multiplier(self) -> Multiplier:
        """For one thread: it adds the last slice."""
        width = self._size - (math.ceil(self._size / self._slice) - 1) * self._slice
        return FixedMultiplier(self._tiles(width), self._sums_of, begun=self._size > self._slice)
