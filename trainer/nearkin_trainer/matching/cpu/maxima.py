# ruff: noqa: PLR0917 (compiled functions take no keywords)
"""Forward: one class at a time, with everything about it in this core's cache.

For each class: read its row once, for the lengths of its locations; for each probe that wants it, sims
[Q, P] by tiles, and both maxima while the sims are in cache. The lengths multiply the sims, not the row.
Where the processor multiplies faster in fixed point, float32 is left for what that cannot tell apart.

P probe locations, Q class locations, C channels, K blocks of 32 channels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin_trainer.matching.cpu.fixed import FAINT, find, fix, fixed_room
from nearkin_trainer.matching.cpu.instructions import BLOCK, LANES, STEPS, row_maximum
from nearkin_trainer.matching.cpu.layout import (
    Floats,
    Pairs,
    Places,
    Probes,
    Table,
    compiled,
    lines,
    measure,
    of,
    strict,
)
from nearkin_trainer.matching.cpu.tiles import products, rest_products

MOST_PATIENCE = 63  # pairs that go by tiles after one that fixed point could not tell apart


class Found(NamedTuple):
    """What forward finds, for each pair: first of every probe location, then of every class location.

    maxima: float32 [B · M, P + Q]. where: int16, the place of each maximum in the other map.
    dots: float32, what the class location there gave before it was scaled. scales, lengths: float32 [U, Q].
    """

    maxima: Floats
    where: Places
    dots: Floats
    scales: Floats
    lengths: Floats


class Sims(NamedTuple):
    """Room for one pair. sims: [Q, columns]. rest: [P − columns, Q]. Rows belong to Q, columns to P."""

    sims: Floats
    rest: Floats
    row_maxima: Floats
    row_places: NDArray[np.int32]
    column_maxima: Floats
    column_places: NDArray[np.int32]


@compiled
def _room(locations: int, columns: int, rest: int) -> Sims:
    return Sims(
        lines(locations, columns),
        np.empty((rest, locations), np.float32),
        np.empty(locations, np.float32),
        np.empty(locations, np.int32),
        lines(1, columns + rest)[0],
        lines(1, columns + rest)[0].view(np.int32),
    )


@compiled
def _valid(locations: int, columns: int) -> int:
    """Bits of the lanes of the last block that are locations."""
    lanes = min(locations - columns, 0) + LANES
    return (1 << lanes) - 1


@compiled
def _highest(room: Sims, scales: Floats, valid: int) -> None:
    """Maxima of the rows and columns of `sims`, and the first place of each."""
    sims, columns = room.sims, room.sims.shape[1]
    room.column_maxima[:] = -np.inf
    room.column_places[:] = 0
    for q in range(sims.shape[0]):
        room.row_maxima[q] = row_maximum(
            q,
            sims.ctypes.data + q * sims.strides[0],
            columns // LANES,
            valid,
            scales[q],
            room.column_maxima.ctypes.data,
            room.column_places.ctypes.data,
            room.row_places.ctypes.data + 4 * q,
        )


@compiled
def _highest_of_rest(room: Sims, scales: Floats) -> None:
    columns = room.sims.shape[1]
    for r in range(room.rest.shape[0]):
        best, place = np.float32(-np.inf), 0
        for q in range(room.rest.shape[1]):
            sim = room.rest[r, q] * scales[q]
            if sim > best:
                best, place = sim, q
            if sim > room.row_maxima[q]:
                room.row_maxima[q] = sim
                room.row_places[q] = columns + r
        room.column_maxima[columns + r] = best
        room.column_places[columns + r] = place


@compiled
def _write(room: Sims, maxima: Floats, where: Places, dots: Floats) -> None:
    sims, rest, (locations, columns) = room.sims, room.rest, room.sims.shape
    probe_locations = maxima.shape[0] - locations
    for p in range(probe_locations):
        maxima[p] = room.column_maxima[p]
        where[p] = room.column_places[p]
    for p in range(min(columns, probe_locations)):
        dots[p] = sims[np.uint32(room.column_places[p]), p]
    for p in range(columns, probe_locations):
        dots[p] = rest[p - columns, room.column_places[p]]
    for q in range(locations):
        place = np.uint32(room.row_places[q])
        maxima[probe_locations + q] = room.row_maxima[q]
        where[probe_locations + q] = place
        dots[probe_locations + q] = sims[q, place] if place < columns else rest[place - columns, q]


@strict
def _strictly(
    row: Floats, units: Floats, scales: Floats, maxima: Floats, where: Places, dots: Floats
) -> None:
    """For maps with NaN or infinity in them: the first NaN wins its row and its column. units: [K, P, 32]."""
    probe_locations = units.shape[1]
    maxima[:] = -np.inf
    where[:] = 0
    dots[:] = -np.inf
    for p in range(probe_locations):
        for q in range(row.shape[1]):
            dot = np.float32(0)
            for c in range(row.shape[0]):
                dot += units[c // BLOCK, p, c % BLOCK] * row[c, q]
            sim = dot * scales[q]
            for place, other in ((p, q), (probe_locations + q, p)):
                if sim > maxima[place] or (np.isnan(sim) and not np.isnan(maxima[place])):
                    maxima[place] = sim
                    where[place] = other
                    dots[place] = dot


@compiled
def forward(first: int, last: int, table: Table, pairs: Pairs, probes: Probes, found: Found) -> None:
    """Find the maxima for the classes visits[first:last]."""
    probe_locations, (channels, locations) = probes.units.shape[2], table.maps.shape[1:]
    columns, rest = probes.columns, max(probe_locations - probes.columns, 0)
    room, valid = _room(locations, columns, rest), _valid(probe_locations, columns)
    fixes = probes.fixed.shape[0] > 0
    fixed = fixed_room(channels, locations if fixes else 0, columns, rest)
    pause, patience = 0, 0
    for visit in range(first, last):
        u, following = pairs.visits[visit], pairs.visits[min(visit + 1, last - 1)]
        row, scales = table.maps[pairs.ids[u]], found.scales[u]
        ahead = table.maps[pairs.ids[following]].ctypes.data
        top = measure(row, of(table.visibility, u), scales, found.lengths[u])
        is_fixed = False
        for pair in pairs.pairs[pairs.starts[u] : pairs.starts[u + 1]]:
            b = pair // pairs.candidates
            maxima, where, dots = found.maxima[pair], found.where[pair], found.dots[pair]
            if not (np.isfinite(top) and np.isfinite(probes.tops[b])):
                _strictly(row, probes.units[b], scales, maxima, where, dots)
                continue
            if fixes and not pause and top >= FAINT and probes.tops[b] >= FAINT:
                if not is_fixed:
                    fix(row, scales, top, fixed.factors, fixed.row)
                    is_fixed = True
                if find(fixed, row, scales, probes.panels[b], probes.fixed[b], ahead, maxima, where, dots):
                    patience //= 4
                    continue
                # Where locations are all alike, the next pairs are spared what would be in vain.
                patience = min(4 * patience + 3, MOST_PATIENCE)
                pause = patience
            else:
                pause = max(pause - 1, 0)
            panel, size = probes.panels[b], row.strides[0]
            for c in range(0, channels, STEPS):
                steps = min(STEPS, channels - c)
                products(row, panel, columns, room.sims, c, steps, ahead + c * size, steps * size)
                if rest:
                    rest_products(row, panel, columns, room.rest, c, steps)
            _highest(room, scales, valid)
            if rest:
                _highest_of_rest(room, scales)
            _write(room, maxima, where, dots)
