"""The quick pass: each tile of products once, rounded to bfloat16, sieved for both its rows and its columns.

Each worker thread multiplies a tile that fits its cache and sieves it while it is hot; the sieves of one
block of rows are guarded by a lock. Which entries a sieve holds depends on the order of tiles, what follows
from them does not: everything that may belong to a row's k best is there, or the row is closed.

Dimension letters: M keys, P keys and what pads them to whole blocks, D elements of a key, E the same padded
to 32 if they are bfloat16, B rows of a block.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.contract import BuildMonitor
from nearkin_service.engines.keys import KeyedRows, each_block, fill_keys
from nearkin_service.engines.mixed.held import ImpliedKeys, KeptKeys, Keys
from nearkin_service.engines.mixed.kernels import (
    ROUNDING,
    VACANT,
    Sieve,
    round_rows,
    sieve_columns,
    sieve_rows,
)
from nearkin_service.engines.mixed.products import aligned
from nearkin_service.engines.mixed.simd import WIDTH
from nearkin_service.engines.mixed.threads import one_thread, torch_alone
from nearkin_service.engines.pacing import Pace
from nearkin_service.engines.workers import in_threads

log = logging.getLogger("nearkin.engines")

_TRIED, _TRIALS = 512, 7
_WORTH_ROUNDING = 1.2
_TILE_PRODUCTS = 1 << 35  # at most a fraction of a second per tile and thread
_TILE_ROWS = 512
_TILE_ROWS_NARROW = 1024
_SUMMED = 512  # elements that a float32 tile sums in the library's order; these sums are added up here
_STRIP = 128  # rows of a tile on the diagonal, of which one half is copied from the other


@dataclass(frozen=True, slots=True)
class TileKeys:
    """What tiles are multiplied from.

    Attributes:
        values: bfloat16 as uint16 [M, E], or the float32 keys [M, D].
        errors: float64 [P], by how much at most the product of two rows of `values`, summed in float32,
            differs from the true score, for this key and any other.
        block: rows of a block; P is the least multiple of it that is M or more.
    """

    values: NDArray[np.uint16] | NDArray[np.float32]
    errors: NDArray[np.float64]
    block: int


def tile_keys(keys_MD: NDArray[np.float32], monitor: BuildMonitor) -> TileKeys:
    """Keys in the type whose products are quickest here."""
    if fastest_products() == "bfloat16":
        return _rounded(keys_MD, monitor)
    block, padded = _blocks(*keys_MD.shape)
    return TileKeys(keys_MD, _errors(np.zeros(padded), summed_at_most(keys_MD.shape[1])), block)


def summed_at_most(size: int) -> int:
    """Roundings that a product of float32 keys sees in a tile: those of one part, and one per part."""
    parts = math.ceil(size / _SUMMED)
    return size if parts < 2 else _SUMMED + parts


@cache
def fastest_products() -> str:
    """What tiles are multiplied in: "bfloat16" where that gains something, else "float32".

    Processors with AMX multiply bfloat16 several times as fast as float32. Those that only have AVX-512's
    bfloat16 instructions may not gain anything, and float32 leaves fewer rows in doubt.
    """
    import torch

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.randn(_TRIED, _TRIED).to(dtype)
        out = torch.empty(_TRIED, _TRIED, dtype=dtype)
        times = []
        for _ in range(_TRIALS):
            began = time.perf_counter()
            torch.mm(matrix, matrix.T, out=out)
            times.append(time.perf_counter() - began)
        return min(times)

    with torch_alone():
        one_thread()
        ratio = seconds(torch.float32) / seconds(torch.bfloat16)
    chosen = "bfloat16" if ratio > _WORTH_ROUNDING else "float32"
    log.info("tiles are multiplied in %s: bfloat16 is %.1f times as fast as float32 here", chosen, ratio)
    return chosen


def _rounded(keys_MD: NDArray[np.float32], monitor: BuildMonitor) -> TileKeys:
    count = len(keys_MD)
    rounded = _Rounded(*keys_MD.shape)

    def convert(start: int) -> None:
        rounded.put(start, keys_MD[start : start + 256])

    in_threads(convert, range(0, count, 256), lambda begun: monitor.check())
    return rounded.tile_keys()


def keys_for_tiles(
    source: KeyedRows, present: NDArray[np.int64], monitor: BuildMonitor
) -> tuple[Keys, TileKeys]:
    """The keys of present classes, and what tiles are multiplied from."""
    if ImpliedKeys.suit(source) and fastest_products() == "bfloat16":
        return _implied(source, present, monitor)
    keys_MD = aligned((len(present), source.key_size), np.float32)
    fill_keys(keys_MD, source, present, monitor)
    return KeptKeys(keys_MD), tile_keys(keys_MD, monitor)


def _implied(
    source: KeyedRows, present: NDArray[np.int64], monitor: BuildMonitor
) -> tuple[ImpliedKeys, TileKeys]:
    keys, local = ImpliedKeys(source, present, monitor), threading.local()
    rounded = _Rounded(*keys.shape)

    def convert(start: int, ids: NDArray[np.int64], block_BR: NDArray[Any]) -> None:
        if not hasattr(local, "keys"):
            local.keys = np.empty(block_BR.shape, np.float32)
        keys_BD = local.keys[: len(ids)] if len(local.keys) >= len(ids) else np.empty_like(block_BR)
        keys.factors_M[start : start + len(ids)] = source.write_keys(keys_BD, block_BR, ids, "class")
        rounded.put(start, keys_BD)

    each_block(source, present, convert, monitor)
    return keys, rounded.tile_keys()


class _Rounded:
    """Keys in bfloat16, to be put there block by block."""

    def __init__(self, count: int, size: int) -> None:
        self._size = size
        self._block, padded = _blocks(count, size)
        self._bits_ME = np.empty((count, math.ceil(size / WIDTH) * WIDTH), np.uint16)
        self._bits_ME[:, size:] = 0
        self._lost_P = np.zeros(padded)

    def put(self, start: int, keys_BD: NDArray[np.float32]) -> None:
        """Keys from number `start` on."""
        some = slice(start, start + len(keys_BD))
        round_rows(keys_BD.view(np.uint32), keys_BD, self._bits_ME[some], self._lost_P[some])

    def tile_keys(self) -> TileKeys:
        """Once all are there."""
        return TileKeys(self._bits_ME, _errors(self._lost_P, self._size), self._block)


def _errors(lost_P: NDArray[np.float64], roundings: int) -> NDArray[np.float64]:
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


def _blocks(count: int, size: int) -> tuple[int, int]:
    """Rows of a block, and of all blocks together."""
    block = _block_rows(count, size)
    return block, math.ceil(count / block) * block


def _block_rows(count: int, size: int) -> int:
    most = _TILE_ROWS if size >= 256 else _TILE_ROWS_NARROW
    while most > 64 and most * most * size > _TILE_PRODUCTS:
        most //= 2
    blocks = math.ceil(count / most)
    return math.ceil(count / blocks / WIDTH) * WIDTH


class _Tiles:
    """Makes tiles, for one thread at a time: each thread that scans has its own."""

    def __init__(self, keys: TileKeys) -> None:
        import torch

        one_thread()
        self._block = keys.block
        self._product = self._part = torch.empty((0, 0))
        if keys.values.dtype == np.float32:
            self._values = torch.from_numpy(keys.values)
            self._product = torch.empty((keys.block, keys.block))
            self._part = torch.empty_like(self._product)
        else:
            self._values = torch.from_numpy(keys.values.view(np.int16)).view(torch.bfloat16)
        self._tile = torch.empty((keys.block, keys.block), dtype=torch.bfloat16)
        self._bits: NDArray[np.int16] = self._tile.view(torch.int16).numpy()

    def tile(self, upper: int, left: int) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
        """The tile's rows as bfloat16 bits, 0 beyond the last key, and the products, if they were float32."""
        import torch

        rows, columns = (self._values[at * self._block : (at + 1) * self._block] for at in (upper, left))
        used = self._tile[: len(rows), : len(columns)]
        if self._product.numel():
            product, part = (of[: len(rows), : len(columns)] for of in (self._product, self._part))
            if upper == left:
                self._multiply_by_strips(rows, product, part)
            else:
                multiply(rows, columns, product, part)
            used.copy_(product)
        elif upper == left:
            self._multiply_by_strips(rows, used)
        else:
            torch.mm(rows, columns.T, out=used)
        self._bits[:, len(columns) :] = 0
        return self._bits[: len(rows)], self._product.numpy()

    def _multiply_by_strips(self, rows: Any, product: Any, part: Any = None) -> None:
        """Products of rows with themselves: the lower half is the upper one's mirror image."""
        import torch

        for top in range(0, len(rows), _STRIP):
            end = top + _STRIP
            if part is None:
                torch.mm(rows[top:end], rows[top:].T, out=product[top:end, top:])
            else:
                multiply(rows[top:end], rows[top:], product[top:, top:], part[top:, top:])
            product[end:, top:end] = product[top:end, end:].T


def multiply(rows: Any, columns: Any, product: Any, part: Any) -> None:
    """All pairs' products, part by part of the elements, into the upper rows of `product`.

    Each sees at most `summed_at_most` roundings; `part` is room for another product like this one.
    """
    import torch

    product, part = product[: len(rows)], part[: len(rows)]
    torch.mm(rows[:, :_SUMMED], columns[:, :_SUMMED].T, out=product)
    for start in range(_SUMMED, rows.shape[1], _SUMMED):
        some = slice(start, start + _SUMMED)
        product += torch.mm(rows[:, some], columns[:, some].T, out=part)


@dataclass(frozen=True, slots=True)
class Start:
    """What a scan need not find out.

    Attributes:
        limits: int16 [P], per row a limit to begin with.
        blocks: only pairs of which one key lies in the first so many blocks are multiplied.
    """

    limits: NDArray[np.int16]
    blocks: int


def scan(
    keys: TileKeys, k: int, places: tuple[int, int], monitor: BuildMonitor, start: Start | None = None
) -> Sieve:
    """Sieves holding, for every row that is not closed, all keys that can be among its k best.

    `places` is how many a row begins with, and how many there are for all rows to grow.
    """
    count, rounded = len(keys.values), keys.values.dtype != np.float32
    sieve = Sieve.empty(*places, keys.errors, ROUNDING if rounded else 0.0)
    blocks = len(keys.errors) // keys.block
    upper_blocks = blocks
    if start is not None:
        sieve.limits[:] = start.limits
        upper_blocks = start.blocks
    locks = [threading.Lock() for _ in range(blocks)]
    local = threading.local()
    pace = Pace(monitor, "search", count)

    def sieve_tile(tile: tuple[int, int]) -> None:
        upper, left = tile
        corner = upper * keys.block, left * keys.block
        if not hasattr(local, "tiles"):
            local.tiles = _Tiles(keys)
        tiles = local.tiles.tile(upper, left)
        if upper == left:
            np.fill_diagonal(tiles[0], VACANT)
        with locks[upper]:
            sieve_rows(tiles, corner, upper == left, k, sieve)
        if upper != left:
            with locks[left]:
                sieve_columns(tiles, corner, k, sieve)

    tiles = [
        (block, block + offset)
        for offset in range(blocks)
        for block in range(min(upper_blocks, blocks - offset))
    ]
    with torch_alone():
        in_threads(sieve_tile, tiles[:upper_blocks], lambda begun: monitor.check())
        in_threads(
            sieve_tile, tiles[upper_blocks:], lambda begun: pace.done(count * begun // max(1, len(tiles)))
        )
    pace.done(count)
    return sieve
