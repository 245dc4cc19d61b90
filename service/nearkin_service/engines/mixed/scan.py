"""The quick pass: each tile of products once, in 16 bits, sieved for both its rows and its columns.

Each worker thread multiplies a tile that fits its cache and sieves it while it is hot; the sieves of one
block of rows are guarded by a lock. Which entries a sieve holds depends on the order of tiles, what follows
from them does not: everything that may belong to a row's k best is there, or the row is closed.

Dimension letters: M keys, P keys and what pads them to whole blocks, D elements of a key, B rows of a block,
G of a group.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.contract import BuildMonitor
from nearkin_service.engines.keys import KeyedRows, each_block, fill_keys
from nearkin_service.engines.mixed.blocks import LANES
from nearkin_service.engines.mixed.fixed import FixedKeys
from nearkin_service.engines.mixed.held import ImpliedKeys, KeptKeys, Keys, as_read_only, multiply_rows
from nearkin_service.engines.mixed.kernels import Sieve, sieve_columns, sieve_rows
from nearkin_service.engines.mixed.products import aligned
from nearkin_service.engines.mixed.quickest import fastest_products
from nearkin_service.engines.mixed.rounded import RoundedKeys
from nearkin_service.engines.mixed.sliced import SlicedKeys
from nearkin_service.engines.mixed.tiles import TileKeys
from nearkin_service.engines.mixed.values import VACANT
from nearkin_service.engines.pacing import Pace
from nearkin_service.engines.workers import in_threads

_GROUPS = 16  # of keys that are put in the tiles' type at once


def tile_keys(keys_MD: NDArray[np.float32], monitor: BuildMonitor) -> TileKeys:
    """Keys in the type whose products are quickest here."""
    count = len(keys_MD)
    packed, step = _room(*keys_MD.shape), _GROUPS * LANES

    def convert(start: int) -> None:
        packed.put(start, keys_MD[start : start + step])

    in_threads(convert, range(0, count, step), lambda done: monitor.check())
    return packed


def _room(count: int, size: int) -> FixedKeys | RoundedKeys:
    return RoundedKeys(count, size) if fastest_products() == "bfloat16" else FixedKeys(count, size)


def keys_for_tiles(
    source: KeyedRows, present: NDArray[np.int64], monitor: BuildMonitor
) -> tuple[Keys, TileKeys]:
    """The keys of present classes, and what tiles are multiplied from."""
    if ImpliedKeys.suit(source):
        return _implied(source, present, monitor)
    keys_MD = aligned((len(present), source.key_size), np.float32)
    fill_keys(keys_MD, source, present, monitor)
    return KeptKeys(keys_MD), tile_keys(keys_MD, monitor)


def _room_for(keys: ImpliedKeys) -> FixedKeys | RoundedKeys:
    if fastest_products() == "int16" and SlicedKeys.suit(*keys.shape):
        return SlicedKeys(keys)
    return _room(*keys.shape)


def _implied(
    source: KeyedRows, present: NDArray[np.int64], monitor: BuildMonitor
) -> tuple[ImpliedKeys, TileKeys]:
    keys, local = ImpliedKeys(source, present, monitor), threading.local()
    packed = _room_for(keys)

    def convert(start: int, ids: NDArray[np.int64], block_BR: NDArray[np.float32]) -> None:
        if not hasattr(local, "keys"):
            local.keys = np.empty((len(ids), keys.shape[1]), np.float32)
        keys_BD = local.keys[: len(ids)]
        keys.factors_M[start : start + len(ids)] = factors = source.factors_of(block_BR, ids)
        multiply_rows(as_read_only(block_BR), factors, keys_BD)
        packed.put(start, keys_BD)

    each_block(source, present, convert, monitor, LANES)
    return keys, packed


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
    keys.prepare(monitor)
    count, errors = keys.count, keys.errors
    sieve = Sieve.empty(*places, errors, keys.rounding)
    blocks = len(errors) // keys.block
    upper_blocks = blocks
    if start is not None:
        sieve.limits[:] = start.limits
        upper_blocks = start.blocks
    locks = [threading.Lock() for _ in range(blocks)]
    local = threading.local()
    pace = Pace(monitor, "search", count)

    def sieve_tile(at: tuple[int, int]) -> None:
        upper, left = at
        corner = upper * keys.block, left * keys.block
        if not hasattr(local, "multiplier"):
            local.multiplier = keys.multiplier()
        tile = local.multiplier.tile(upper, left)
        if upper == left:
            np.fill_diagonal(tile, VACANT)
        with locks[upper]:
            sieve_rows(tile, corner, upper == left, k, sieve)
        if upper != left:
            with locks[left]:
                sieve_columns(tile, corner, k, sieve)

    tiles = [
        (block, block + offset)
        for offset in range(blocks)
        for block in range(min(upper_blocks, blocks - offset))
    ]
    with keys.computing():
        in_threads(sieve_tile, tiles[:upper_blocks], lambda done: monitor.check())
        in_threads(
            sieve_tile, tiles[upper_blocks:], lambda done: pace.done(count * done // max(1, len(tiles)))
        )
    pace.done(count)
    return sieve
