# ruff: noqa: PLR0917 (compiled functions take no keywords)
"""Backward: a maximum's gradient goes to one pair of locations.

A pair of maps costs at most P + Q row updates in place of two matrix products. They go through the channels
by blocks of 32, of which everything fits the innermost cache. A class row is read once, and its gradient
written once. Where there are many probes, a pass goes through some of the blocks of all classes, so that the
units and gradients of the probes stay near.

P probe locations, Q class locations, C channels, K blocks of 32 channels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin_trainer.matching.cpu.exchanges import exchange, fetch, give_16, stream
from nearkin_trainer.matching.cpu.instructions import BLOCK, LANES, LINE
from nearkin_trainer.matching.cpu.layout import (
    EPSILON,
    Floats,
    Ids,
    Pairs,
    Places,
    Probes,
    Table,
    block_of,
    compiled,
    lines,
    pace,
    whole_tiles,
)

LOCATION = 4 * BLOCK  # bytes of a location in a block
CACHED = 1 << 23  # bytes of units and gradients of all probes that a pass goes through


class Given(NamedTuple):
    """What backward takes over from forward, see `maxima.Found`, and weights: the gradients of its maxima."""

    weights: Floats
    where: Places
    dots: Floats
    scales: Floats
    lengths: Floats


class Wanted(NamedTuple):
    """Gradients to fill: units [B, K, P, 32] of one thread, rows [U, C, Q] (or none), visibility [U, Q]."""

    units: Floats
    rows: Floats
    visibility: Floats


class Links(NamedTuple):
    """Pairs of locations with a gradient, of each pair of maps of one class: where they lie, weights, counts.

    places: int32 [pairs of maps, P + Q, 2], the p and q of a link in bytes from the first location.
    """

    places: NDArray[np.int32]
    weights: Floats
    counts: NDArray[np.int32]


class Lines(NamedTuple):
    """Lines of memory to fetch."""

    start: int
    length: int


class Copy(NamedTuple):
    """Lines of memory to copy."""

    source: int
    target: int
    length: int


@compiled
def _along(pairs: Ids, given: Given, lengths: Floats, visibility: Floats) -> None:
    """The gradient of each location's visibility, which is also what it has along the location."""
    locations = visibility.shape[0]
    probe_locations = given.where.shape[1] - locations
    visibility[:] = 0
    for pair in pairs:
        weights, dots, where = given.weights[pair], given.dots[pair], given.where[pair]
        for p in range(probe_locations):
            visibility[where[p]] += weights[p] * dots[p]
        for q in range(locations):
            visibility[q] += weights[probe_locations + q] * dots[probe_locations + q]
    for q in range(locations):
        visibility[q] /= max(lengths[q], EPSILON)


@compiled
def _room(pairs: Pairs, first: int, last: int, places: int) -> Links:
    most = 0
    for u in pairs.visits[first:last]:
        most = max(most, pairs.starts[u + 1] - pairs.starts[u])
    return Links(
        np.empty((most, places, 2), np.int32),
        np.empty((most, places), np.float32),
        np.empty(most, np.int32),
    )


@compiled
def _link(weights: Floats, where: Places, locations: int, links: Links, slot: int) -> None:
    """List the pairs of locations that a pair of maps passes gradients through."""
    probe_locations = where.shape[0] - locations
    places, sums = links.places[slot], links.weights[slot]
    for p in range(probe_locations):
        places[p, 0], places[p, 1], sums[p] = LOCATION * p, LOCATION * where[p], weights[p]
    count = probe_locations
    for q in range(locations):
        p = where[probe_locations + q]
        if where[p] == q:
            # Each is the other's best: one link.
            sums[p] += weights[probe_locations + q]
        else:
            places[count, 0], places[count, 1] = LOCATION * p, LOCATION * q
            sums[count] = weights[probe_locations + q]
            count += 1
    links.counts[slot] = count


@compiled
def _exchanged(
    slot: int,
    links: Links,
    units: Floats,
    unit_gradients: Floats,
    tall: Floats,
    gradients: Floats,
    ahead: Lines,
    behind: Copy,
) -> None:
    """Add the gradients of a pair's links, in 32 channels: units [P, 32], tall and gradients [Q, 32].

    Meanwhile it fetches what comes next and writes what was done before: memory is idle while this adds, and
    this would wait if memory had it all at once.
    """
    count = links.counts[slot]
    exchange(
        count,
        links.places[slot].ctypes.data,
        links.weights[slot].ctypes.data,
        units.ctypes.data,
        tall.ctypes.data,
        unit_gradients.ctypes.data,
        gradients.ctypes.data,
        ahead.start,
        pace(ahead.length * LINE, count),
        behind.source,
        behind.target,
        behind.length,
    )
    for line in range(count, ahead.length):
        fetch(ahead.start + line * LINE)
    _finish_copy(behind, count)


@compiled
def _factors(visibility: Floats, lengths: Floats, scales: Floats, factors: Floats) -> None:
    """How much of each location to take off its gradient, which has no part along it."""
    for q in range(lengths.shape[0]):
        # Below the floor the length is a constant, and only the scale remains.
        factors[q] = scales[q] * visibility[q] / lengths[q] if lengths[q] > EPSILON else np.float32(0)


@compiled
def _factors_in(gradients: Floats, tall: Floats, lengths: Floats, factors: Floats) -> None:
    """As `_factors`, of gradients that are all here: in few channels, their own rounding lies along too."""
    for q in range(lengths.shape[0]):
        along = np.float32(0)
        for c in range(BLOCK):
            along += gradients[q, c] * tall[q, c]
        factors[q] = along / lengths[q] / lengths[q] if lengths[q] > EPSILON else np.float32(0)


@compiled
def _through_length(gradients: Floats, scales: Floats, factors: Floats, row: Floats, target: Floats) -> None:
    """Gradients of scaled locations [Q, 32] as those of the locations themselves, `row` and target [c, Q]."""
    channels, locations = target.shape
    by_tile = whole_tiles(channels, locations)
    for start in range(0, by_tile, LANES):
        q = min(start, locations - LANES)
        for c in range(0, BLOCK, LANES):
            give_16(
                gradients.ctypes.data + q * gradients.strides[0] + 4 * c,
                gradients.strides[0],
                scales.ctypes.data + 4 * q,
                factors.ctypes.data + 4 * q,
                row.ctypes.data + c * row.strides[0] + 4 * q,
                row.strides[0],
                target.ctypes.data + c * target.strides[0] + 4 * q,
                target.strides[0],
            )
    for q in range(by_tile, locations):
        for c in range(channels):
            target[c, q] = scales[q] * gradients[q, c] - factors[q] * row[c, q]


@compiled
def _begin_copy(source: Floats, target: Floats) -> Copy:
    """Copy the ends of a few rows to a gradient; between them are whole lines, to be written past the caches.

    The gradient is large, and not read before the next step.
    """
    size, start = 4 * target.size, target.ctypes.data
    head = min(-start % LINE, size)
    whole = (size - head) // LINE * LINE
    from_1d, to_1d = source.reshape(-1), target.reshape(-1)
    to_1d[: head // 4] = from_1d[: head // 4]
    to_1d[(head + whole) // 4 :] = from_1d[(head + whole) // 4 : target.size]
    return Copy(source.ctypes.data + head, start + head, whole // LINE)


@compiled
def _finish_copy(copy: Copy, first: int) -> None:
    for line in range(first, copy.length):
        stream(copy.source + line * LINE, copy.target + line * LINE)


@compiled
def _part(copy: Copy, index: int, parts: int) -> Copy:
    first, last = copy.length * index // parts, copy.length * (index + 1) // parts
    return Copy(copy.source + first * LINE, copy.target + first * LINE, last - first)


@compiled
def _part_ahead(row: Floats, block: int, index: int, parts: int) -> Lines:
    """A part of the lines of a block of a class."""
    start, count = row.ctypes.data + block * BLOCK * row.strides[0], BLOCK * row.strides[0] // LINE
    first, last = count * index // parts, count * (index + 1) // parts
    return Lines(start + first * LINE, last - first)


@compiled
def backward(
    first: int,
    last: int,
    table: Table,
    pairs: Pairs,
    probes: Probes,
    given: Given,
    wanted: Wanted,
) -> None:
    """Gradients for the classes visits[first:last]."""
    channels, locations = table.maps.shape[1:]
    batch, count, probe_locations = probes.units.shape[:3]
    tall, gradients = lines(locations, BLOCK), lines(locations, BLOCK)
    factors = np.empty(locations, np.float32)
    done, behind = lines(BLOCK, locations), Copy(0, 0, 0)
    links = _room(pairs, first, last, given.where.shape[1])
    rows = wanted.rows.shape[0] > 0
    span = max(CACHED // (2 * 4 * BLOCK * batch * probe_locations), 1)
    wanted.units[:] = 0
    for start in range(0, count, span):
        for visit in range(first, last):
            u, following = pairs.visits[visit], pairs.visits[min(visit + 1, last - 1)]
            row, scales = table.maps[pairs.ids[u]], given.scales[u]
            mine = pairs.pairs[pairs.starts[u] : pairs.starts[u + 1]]
            for slot in range(mine.shape[0]):
                _link(given.weights[mine[slot]], given.where[mine[slot]], locations, links, slot)
            if rows:
                if start == 0:
                    _along(mine, given, given.lengths[u], wanted.visibility[u])
                _factors(wanted.visibility[u], given.lengths[u], scales, factors)
            for block in range(start, min(start + span, count)):
                block_of(row, block, scales, tall)
                gradients[:] = 0
                for slot in range(mine.shape[0]):
                    b = mine[slot] // pairs.candidates
                    _exchanged(
                        slot,
                        links,
                        probes.units[b, block],
                        wanted.units[b, block],
                        tall,
                        gradients,
                        _part_ahead(table.maps[pairs.ids[following]], block, slot, mine.shape[0]),
                        _part(behind, slot, mine.shape[0]),
                    )
                if rows:
                    if count == 1:
                        _factors_in(gradients, tall, given.lengths[u], factors)
                    c = block * BLOCK
                    some = done[: min(BLOCK, channels - c)]
                    _through_length(gradients, scales, factors, row[c : c + some.shape[0]], some)
                    behind = _begin_copy(some, wanted.rows[u, c : c + some.shape[0]])
    _finish_copy(behind, 0)


@compiled
def finish(
    first: int,
    last: int,
    table: Table,
    probes: Probes,
    unit_gradients: Floats,
    map_gradients: Floats,
    visibility_gradients: Floats,
) -> None:
    """Gradients [B, C, P] and [B, P] of the probes, from those of their units [threads, B, K, P, 32]."""
    channels, locations = table.maps.shape[1:]
    tall, ones = lines(locations, BLOCK), np.ones(locations, np.float32)
    factors = np.empty(locations, np.float32)
    for b in range(first, last):
        row, lengths, along = table.maps[b], probes.lengths[b], visibility_gradients[b]
        along[:] = 0
        for block in range(unit_gradients.shape[2]):
            total = unit_gradients[0, b, block]
            # In order, so that the same threads give the same bits.
            for thread in range(1, unit_gradients.shape[0]):
                total += unit_gradients[thread, b, block]
            block_of(row, block, ones, tall)
            for p in range(locations):
                for c in range(BLOCK):
                    along[p] += tall[p, c] * total[p, c]
        for p in range(locations):
            along[p] /= max(lengths[p], EPSILON)
        _factors(along, lengths, probes.scales[b], factors)
        for block in range(unit_gradients.shape[2]):
            c = block * BLOCK
            target = map_gradients[b, c : min(c + BLOCK, channels)]
            some = row[c : c + target.shape[0]]
            _through_length(unit_gradients[0, b, block], probes.scales[b], factors, some, target)
