# ruff: noqa: PLR0917 (compiled functions take no keywords)
"""Forward: one class at a time, with everything about it in this core's cache.

For each class: read its row once, for the lengths of its locations; for each probe that wants it, sims
[Q, P] by tiles, and both maxima while the sims are in cache. The lengths multiply the sims, not the row.

P probe locations, Q class locations, C channels, K blocks of 32 channels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin_trainer.matching.cpu.instructions import (
    BLOCK,
    FEW_VECTORS,
    LANES,
    LINE,
    MOST_VECTORS,
    ROWS,
    STEPS,
    product_tile,
    row_maximum,
)
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
    pace,
    strict,
)


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
def _parts(total: int, size: int) -> int:
    return (total + size - 1) // size


@compiled
def _cut(total: int, parts: int, index: int) -> int:
    """Where part `index` begins of parts that differ by one at most."""
    return total * index // parts


@compiled
def _products(row: Floats, panel: Floats, sims: Floats, channel: int, steps: int, ahead: int) -> None:
    """Add some channels to sims [Q, columns] of a class [C, Q] and a panel [C, columns].

    Those of the class at `ahead` are fetched.
    """
    locations, vectors = row.shape[1], panel.shape[1] // LANES
    a, b = row.ctypes.data + channel * row.strides[0], panel.ctypes.data + channel * panel.strides[0]
    ahead += channel * row.strides[0]
    high, wide = _parts(locations, ROWS), _parts(vectors, MOST_VECTORS)
    fetched = pace(steps * row.strides[0], steps * high * wide)
    for column in range(wide):
        first, end = _cut(vectors, wide, column), _cut(vectors, wide, column + 1)
        for part in range(high):
            q = _cut(locations, high, part)
            product_tile(
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
def _rest_products(row: Floats, rest: Floats, sims: Floats, channel: int, steps: int) -> None:
    """Add some channels to sims [P − columns, Q] of the locations that are not in the panel; Q ≥ 16."""
    locations, count = row.shape[1], rest.shape[1]
    a, b = rest.ctypes.data + channel * rest.strides[0], row.ctypes.data + channel * row.strides[0]
    vectors = _parts(locations, LANES)
    wide = _parts(vectors, FEW_VECTORS[count - 1])
    for column in range(wide):
        # The last tile has two vectors at least if there are two: none overlaps another tile's, which
        # would add to its sims again.
        first, end = _cut(vectors, wide, column), _cut(vectors, wide, column + 1)
        start = first * LANES
        product_tile(
            count,
            end - first,
            a,
            rest.strides[0],
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
    probe_locations, locations = probes.units.shape[2], table.maps.shape[2]
    columns = probes.panels.shape[2]
    room = _room(locations, columns, max(probe_locations - columns, 0))
    valid = _valid(probe_locations, columns)
    for visit in range(first, last):
        u, following = pairs.visits[visit], pairs.visits[min(visit + 1, last - 1)]
        row, scales = table.maps[pairs.ids[u]], found.scales[u]
        ahead = table.maps[pairs.ids[following]].ctypes.data
        top = measure(row, of(table.visibility, u), scales, found.lengths[u])
        for pair in pairs.pairs[pairs.starts[u] : pairs.starts[u + 1]]:
            b = pair // pairs.candidates
            maxima, where, dots = found.maxima[pair], found.where[pair], found.dots[pair]
            if np.isfinite(top) and np.isfinite(probes.tops[b]):
                panel, rest = probes.panels[b], probes.rest[b]
                for channel in range(0, row.shape[0], STEPS):
                    steps = min(STEPS, row.shape[0] - channel)
                    _products(row, panel, room.sims, channel, steps, ahead)
                    if probe_locations > columns:
                        _rest_products(row, rest, room.rest, channel, steps)
                _highest(room, scales, valid)
                if probe_locations > columns:
                    _highest_of_rest(room, scales)
                _write(room, maxima, where, dots)
            else:
                _strictly(row, probes.units[:, b], scales, maxima, where, dots)
