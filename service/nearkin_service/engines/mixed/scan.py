"""The low-precision pass: each bfloat16 tile once, sieved for both its rows and its columns.

Each worker thread multiplies a tile that fits its cache and sieves it while it is hot; the sieves of one
block of rows are guarded by a lock. Which entries a sieve holds depends on the order of tiles, what follows
from them does not: everything that may belong to a row's k best is there, or the row is closed.

Dimension letters: M keys, P keys padded to whole blocks, D elements of a key, E the same padded to 32,
W places in a sieve's row.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.contract import BuildMonitor
from nearkin_service.engines.mixed.kernels import VACANT, Sieve, round_rows, sieve_columns, sieve_rows
from nearkin_service.engines.mixed.simd import WIDTH
from nearkin_service.engines.pacing import Pace
from nearkin_service.engines.workers import in_threads

_TILE_PRODUCTS = 1 << 35  # at most a fraction of a second per tile and thread
_TILE_ROWS = 512
_TILE_ROWS_NARROW = 1024


@dataclass(frozen=True, slots=True)
class RoundedKeys:
    """Keys in bfloat16, padded with zeros to whole blocks, and what the rounding can do to a score.

    Attributes:
        bits: uint16 [P, E]. errors: float64 [P], by how much at most the exact product of two rounded keys,
        summed in float32, differs
            from the true score, for this key and any other.
        block: rows of a block; P is a multiple of it.
        count: M.
    """

    bits: NDArray[np.uint16]
    errors: NDArray[np.float64]
    block: int
    count: int


def rounded(keys_MD: NDArray[np.float32]) -> RoundedKeys:
    """Round keys to bfloat16 and bound what that does.

    With a = â + r and b = b̂ + q: |a·b - â·b̂| <= |â||q| + |r||b̂| + |r||q| (Cauchy-Schwarz), and a float32
    sum of D exact products, in any order, is off by at most D * 2**-24 * |â||b̂|.
    """
    count, size = keys_MD.shape
    block = _block_rows(count, size)
    padded = math.ceil(count / block) * block
    bits_PE = np.zeros((padded, math.ceil(size / WIDTH) * WIDTH), np.uint16)
    lost_P = np.zeros(padded)

    def convert(start: int) -> None:
        rows = slice(start, min(count, start + 256))
        keys = keys_MD[rows]
        round_rows(keys.view(np.uint32), keys, bits_PE[rows, :size], lost_P[rows])

    in_threads(convert, range(0, count, 256))
    most = float(lost_P.max(initial=0.0))
    length = 1 + 2.0**-20 + lost_P  # a float32 key is this long at most, and so is its rounded form
    longest = 1 + 2.0**-20 + most
    errors_P = length * most + lost_P * longest + lost_P * most + (size + 8) * 2.0**-24 * length * longest
    return RoundedKeys(bits_PE, errors_P * 1.001, block, count)


def _block_rows(count: int, size: int) -> int:
    most = _TILE_ROWS if size >= 256 else _TILE_ROWS_NARROW
    while most > 64 and most * most * size > _TILE_PRODUCTS:
        most //= 2
    blocks = math.ceil(count / most)
    return math.ceil(count / blocks / WIDTH) * WIDTH


def scan(keys: RoundedKeys, k: int, width: int, monitor: BuildMonitor) -> Sieve:
    """Sieves holding, for every row that is not closed, all keys that can be among its k best."""
    import torch

    sieve = Sieve.empty(len(keys.bits), width, keys.errors)
    matrix_PE = torch.from_numpy(keys.bits.view(np.int16)).view(torch.bfloat16)
    blocks = len(keys.bits) // keys.block
    locks = [threading.Lock() for _ in range(blocks)]
    local = threading.local()
    pace = Pace(monitor, "search", keys.count)

    def product(upper: int, left: int) -> NDArray[np.int16]:
        if not hasattr(local, "tile"):
            torch.set_num_threads(1)
            local.tile = torch.empty((keys.block, keys.block), dtype=torch.bfloat16)
        rows, columns = (slice(at * keys.block, (at + 1) * keys.block) for at in (upper, left))
        torch.mm(matrix_PE[rows], matrix_PE[columns].T, out=local.tile)
        bits: NDArray[np.int16] = local.tile.view(torch.int16).numpy()
        return bits

    def sieve_tile(tile: tuple[int, int]) -> None:
        upper, left = tile
        corner = upper * keys.block, left * keys.block
        tile_BB = product(upper, left)
        if upper == left:
            np.fill_diagonal(tile_BB, VACANT)
        tile_BB = tile_BB[: keys.count - corner[0]]
        with locks[upper]:
            sieve_rows(tile_BB, corner, upper == left, k, sieve)
        if upper != left:
            with locks[left]:
                sieve_columns(tile_BB, corner, k, sieve)

    tiles = [(block, block + offset) for offset in range(blocks) for block in range(blocks - offset)]
    before = torch.get_num_threads()
    try:
        in_threads(sieve_tile, tiles[:blocks])
        in_threads(sieve_tile, tiles[blocks:], lambda begun: pace.done(keys.count * begun // len(tiles)))
    finally:
        torch.set_num_threads(before)
    pace.done(keys.count)
    return sieve
