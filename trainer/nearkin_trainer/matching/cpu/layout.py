"""How maps lie in memory for the compiled loops, and how these are compiled.

B probes, P probe locations, Q class locations, C channels, K blocks of 32 channels (zero-padded).

A class is used as it lies in the table, [C, Q]. A probe is laid out twice, once per step: as panels, whose
rows hold the locations of one channel, for the products; and as blocks [K, P, 32], whose rows hold 32
channels of one location, for everything that adds up locations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nearkin_trainer.matching.cpu.exchanges import take_16
from nearkin_trainer.matching.cpu.instructions import BLOCK, LANES, LINE, square_sums

EPSILON = np.float32(1e-12)
Floats = NDArray[np.float32]
Places = NDArray[np.int16]
Ids = NDArray[np.int64]
Loop = TypeVar("Loop", bound=Callable[..., Any])


def compiled(function: Loop) -> Loop:
    """Compile with sums reordered into vectors; NaN and infinity keep their meaning.

    And into whoever calls it: a process that compiles would otherwise call each loop as compiled by itself,
    and one that finds the callers on disk the copies within them, whose sums may be ordered otherwise.
    """
    return cast("Loop", _njit(function, fastmath={"contract", "reassoc", "nsz"}, forceinline=True))


def strict(function: Loop) -> Loop:
    """Compile as written."""
    return cast("Loop", _njit(function))


def _sources() -> str:
    """A digest of this package, whose loops and instructions are compiled into one another."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


SOURCES = _sources()


def _njit(function: Callable[..., Any], **options: Any) -> Any:
    # Numba keeps compiled functions by name, and asks only whether the file that defines them has changed.
    function.__qualname__ += f"_{SOURCES}"
    try:
        return njit(nogil=True, error_model="numpy", cache=True, **options)(function)
    except RuntimeError:  # nowhere to write: compile in every process
        return njit(nogil=True, error_model="numpy", **options)(function)


class Table(NamedTuple):
    """maps: float32 [N, C, Q]. visibility: float32 [U, Q], of the touched classes, or [1, Q] for all."""

    maps: Floats
    visibility: Floats


class Probes(NamedTuple):
    """Every probe, laid out by `prepare`. A unit is a location times its scale.

    panels: [B, C, ≥ P], whole vectors, zeros beyond P. columns: how many of P are multiplied by vectors, as
    the few others would leave most of one more vector empty.
    fixed: int32 [B, C / 2, 64], the units in fixed point, see `fix_pairs`; or [0, …].
    units: [B, K, P, 32]. scales: [B, P], visibility / length. lengths: [B, P].
    tops: [B], the top |visibility|, or NaN where something is not finite.
    """

    panels: Floats
    columns: int
    fixed: NDArray[np.int32]
    units: Floats
    scales: Floats
    lengths: Floats
    tops: Floats


class Pairs(NamedTuple):
    """The pairs (probe · candidates + candidate) of a step, grouped by the class they want.

    ids: int64 [U], the classes. visits: int64 [U], in which order: classes that meet the same probe follow
    each other. starts: int64 [U + 1] into pairs. candidates: M, to find a pair's probe.
    """

    ids: Ids
    visits: Ids
    starts: Ids
    pairs: Ids
    candidates: int


@compiled
def lines(rows: int, columns: int) -> Floats:
    """An uninitialised array that starts with a cache line: vectors across two of them cost more."""
    size = rows * columns
    values = np.empty(size + LINE // 4, np.float32)
    skipped = (-values.ctypes.data % LINE) // 4
    array: Floats = values[skipped : skipped + size].reshape(rows, columns)
    return array


@compiled
def of(visibility: Floats, index: int) -> Floats:
    row: Floats = visibility[index if visibility.shape[0] > 1 else 0]
    return row


@compiled
def measure(row: Floats, visibility: Floats, scales: Floats, lengths: Floats) -> np.float32:
    """Lengths are |row[:, q]|, scales visibility / length. The top |visibility|, NaN if not all is finite."""
    channels, locations = row.shape
    if locations < LANES:
        lengths[:] = 0
        for c in range(channels):
            for q in range(locations):
                lengths[q] += row[c, q] * row[c, q]
    else:
        for start in range(0, locations, 4 * LANES):
            first = min(start, locations - LANES)
            columns = min(4 * LANES, locations - first)
            square_sums(
                (columns + LANES - 1) // LANES,
                row.ctypes.data + 4 * first,
                row.strides[0],
                4 * (columns - LANES),
                channels,
                lengths.ctypes.data + 4 * first,
            )
    top = np.float32(0)
    finite = True
    for q in range(locations):
        lengths[q] = np.sqrt(lengths[q])
        scales[q] = visibility[q] / max(lengths[q], EPSILON)
        finite &= np.isfinite(lengths[q]) and np.isfinite(scales[q])
        top = max(top, abs(visibility[q]))
    return top if finite else np.float32(np.nan)


@compiled
def block_of(row: Floats, block: int, scales: Floats, target: Floats) -> None:
    """target[Q, 32] = scales · 32 channels of a map [C, Q], zeros beyond the last channel."""
    first, locations = block * BLOCK, row.shape[1]
    channels = min(BLOCK, row.shape[0] - first)
    if channels < BLOCK:
        target[:] = 0
    by_tile = whole_tiles(channels, locations)
    for start in range(0, by_tile, LANES):
        q = min(start, locations - LANES)
        for c in range(0, BLOCK, LANES):
            take_16(
                row.ctypes.data + (first + c) * row.strides[0] + 4 * q,
                row.strides[0],
                scales.ctypes.data + 4 * q,
                target.ctypes.data + q * target.strides[0] + 4 * c,
                target.strides[0],
            )
    for q in range(by_tile, locations):
        for c in range(channels):
            target[q, c] = row[first + c, q] * scales[q]


@compiled
def whole_tiles(channels: int, locations: int) -> int:
    """How many locations tiles of 16 × 16 cover; a last tile may overlap the one before if it is worth it."""
    rest = locations % LANES
    if channels < BLOCK or locations < LANES:
        return 0
    return locations if rest > LANES // 4 else locations - rest


@compiled
def prepare(first: int, last: int, table: Table, probes: Probes) -> None:
    """Lay out the probes first to last, whose maps and visibilities `table` holds."""
    for b in range(first, last):
        row, scales = table.maps[b], probes.scales[b]
        probes.tops[b] = measure(row, of(table.visibility, b), scales, probes.lengths[b])
        locations = row.shape[1]
        for c in range(row.shape[0]):
            for p in range(locations):
                probes.panels[b, c, p] = row[c, p] * scales[p]
            probes.panels[b, c, locations:] = 0
        for block in range(probes.units.shape[1]):
            block_of(row, block, scales, probes.units[b, block])


@compiled
def pace(size: int, steps: int) -> int:
    """How many bytes to fetch at each step, so that it is done in all of them; a line at most."""
    return min((size + steps - 1) // steps, LINE)
