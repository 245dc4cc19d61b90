# ruff: noqa: PLR0917 (compiled functions take no keywords)
"""Backward: a maximum's gradient goes to one pair of locations.

A pair of maps costs P + Q row updates in place of two matrix products. They run through a few blocks of 32
channels at a time, for all classes: of so few, the units of all probes and their gradients stay in this
core's cache, whichever probe a class meets. A class row is read once and its gradient written once.

P probe locations, Q class locations, C channels, K blocks of 32 channels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nearkin_trainer.matching.cpu.instructions import BLOCK, LANES, LINE, exchange, fetch, give_16, stream
from nearkin_trainer.matching.cpu.layout import (
    EPSILON,
    Floats,
    Pairs,
    Places,
    Probes,
    Table,
    block_of,
    compiled,
    whole_tiles,
)

CACHED = 1 << 20  # bytes of units and gradients of all probes that stay in cache; more than 1 MiB is common


class Given(NamedTuple):
    """What backward takes over from forward, see `maxima.Found`, and weights: the gradients of its maxima."""

    weights: Floats
    where: Places
    dots: Floats
    scales: Floats
    lengths: Floats


class Wanted(NamedTuple):
    """Gradients to fill: units [K, B, P, 32] of one thread, rows [U, C, Q] (or none), visibility [U, Q]."""

    units: Floats
    rows: Floats
    visibility: Floats


@compiled
def _along(u: int, pairs: Pairs, given: Given, visibility: Floats) -> None:
    """The gradient of each location's visibility, which is also what it has along the location."""
    locations = visibility.shape[0]
    probe_locations = given.where.shape[1] - locations
    visibility[:] = 0
    for pair in pairs.pairs[pairs.starts[u] : pairs.starts[u + 1]]:
        weights, dots, where = given.weights[pair], given.dots[pair], given.where[pair]
        for p in range(probe_locations):
            visibility[where[p]] += weights[p] * dots[p]
        for q in range(locations):
            visibility[q] += weights[probe_locations + q] * dots[probe_locations + q]
    for q in range(locations):
        visibility[q] /= max(given.lengths[u, q], EPSILON)


@compiled
def _exchanged(
    pair: int, given: Given, units: Floats, unit_gradients: Floats, tall: Floats, gradients: Floats
) -> None:
    """Add the gradients of a pair's maxima, in 32 channels: units [P, 32], tall and gradients [Q, 32]."""
    weights, where = given.weights[pair], given.where[pair]
    probe_locations, stride = units.shape[0], 4 * BLOCK
    unit, unit_gradient = units.ctypes.data, unit_gradients.ctypes.data
    location, gradient = tall.ctypes.data, gradients.ctypes.data
    for p in range(probe_locations):
        here, there = p * stride, where[p] * stride
        exchange(weights[p], unit + here, location + there, unit_gradient + here, gradient + there)
    for q in range(tall.shape[0]):
        here, there = q * stride, where[probe_locations + q] * stride
        exchange(
            weights[probe_locations + q],
            unit + there,
            location + here,
            unit_gradient + there,
            gradient + here,
        )


@compiled
def _parallels(visibility: Floats, lengths: Floats, parallels: Floats) -> None:
    """How much of each scaled location to take off its gradient, which has no part along it."""
    for q in range(lengths.shape[0]):
        # Below the floor the length is a constant, and only the scale remains.
        parallels[q] = visibility[q] / lengths[q] if lengths[q] > EPSILON else np.float32(0)


@compiled
def _through_length(
    gradients: Floats, tall: Floats, scales: Floats, parallels: Floats, target: Floats
) -> None:
    """Gradients of scaled locations [Q, 32], `tall`, as those of the locations themselves: target [c, Q]."""
    channels, locations = target.shape
    by_tile = whole_tiles(channels, locations)
    for start in range(0, by_tile, LANES):
        q = min(start, locations - LANES)
        for c in range(0, BLOCK, LANES):
            give_16(
                gradients.ctypes.data + q * gradients.strides[0] + 4 * c,
                tall.ctypes.data + q * tall.strides[0] + 4 * c,
                tall.strides[0],
                scales.ctypes.data + 4 * q,
                parallels.ctypes.data + 4 * q,
                target.ctypes.data + c * target.strides[0] + 4 * q,
                target.strides[0],
            )
    for q in range(by_tile, locations):
        for c in range(channels):
            target[c, q] = scales[q] * gradients[q, c] - parallels[q] * tall[q, c]


@compiled
def _copied(source: Floats, target: Floats) -> None:
    """Copy a few rows to a gradient, past the caches: it is large, and not read before the next step."""
    size, start = 4 * target.size, target.ctypes.data
    head = min(-start % LINE, size)
    whole = (size - head) // LINE * LINE
    from_1d, to_1d = source.reshape(-1), target.reshape(-1)
    to_1d[: head // 4] = from_1d[: head // 4]
    for line in range(head, head + whole, LINE):
        stream(source.ctypes.data + line, start + line)
    to_1d[(head + whole) // 4 :] = from_1d[(head + whole) // 4 : target.size]


@compiled
def _fetch_block(row: Floats, block: int) -> None:
    first = row.ctypes.data + block * BLOCK * row.strides[0]
    for line in range(0, BLOCK * row.strides[0], LINE):
        fetch(first + line)


@compiled
def backward(
    first: int, last: int, table: Table, pairs: Pairs, probes: Probes, given: Given, wanted: Wanted
) -> None:
    """Gradients for the classes visits[first:last]."""
    channels, locations = table.maps.shape[1:]
    count, batch, probe_locations = probes.units.shape[:3]
    tall, gradients = np.empty((locations, BLOCK), np.float32), np.empty((locations, BLOCK), np.float32)
    parallels, done = np.empty(locations, np.float32), np.empty((BLOCK, locations), np.float32)
    rows = wanted.rows.shape[0] > 0
    span = max(CACHED // (2 * 4 * BLOCK * batch * probe_locations), 1)
    wanted.units[:] = 0
    for start in range(0, count, span):
        for visit in range(first, last):
            u, following = pairs.visits[visit], pairs.visits[min(visit + 1, last - 1)]
            row, scales = table.maps[pairs.ids[u]], given.scales[u]
            if rows:
                if start == 0:
                    _along(u, pairs, given, wanted.visibility[u])
                _parallels(wanted.visibility[u], given.lengths[u], parallels)
            for block in range(start, min(start + span, count)):
                _fetch_block(table.maps[pairs.ids[following]], block)
                block_of(row, block, scales, tall)
                gradients[:] = 0
                for pair in pairs.pairs[pairs.starts[u] : pairs.starts[u + 1]]:
                    b = pair // pairs.candidates
                    _exchanged(pair, given, probes.units[block, b], wanted.units[block, b], tall, gradients)
                if rows:
                    c = block * BLOCK
                    some = done[: min(BLOCK, channels - c)]
                    _through_length(gradients, tall, scales, parallels, some)
                    _copied(some, wanted.rows[u, c : c + some.shape[0]])


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
    """Gradients [B, C, P] and [B, P] of the probes, from those of their units [threads, K, B, P, 32]."""
    channels, locations = table.maps.shape[1:]
    tall, ones = np.empty((locations, BLOCK), np.float32), np.ones(locations, np.float32)
    parallels = np.empty(locations, np.float32)
    for b in range(first, last):
        row, lengths, along = table.maps[b], probes.lengths[b], visibility_gradients[b]
        along[:] = 0
        for block in range(unit_gradients.shape[1]):
            total = unit_gradients[0, block, b]
            # In order, so that the same threads give the same bits.
            for thread in range(1, unit_gradients.shape[0]):
                total += unit_gradients[thread, block, b]
            block_of(row, block, ones, tall)
            for p in range(locations):
                for c in range(BLOCK):
                    along[p] += tall[p, c] * total[p, c]
        for p in range(locations):
            along[p] /= max(lengths[p], EPSILON)
        _parallels(along, lengths, parallels)
        for block in range(unit_gradients.shape[1]):
            c = block * BLOCK
            target = map_gradients[b, c : min(c + BLOCK, channels)]
            _through_length(
                unit_gradients[0, block, b], probes.units[block, b], probes.scales[b], parallels, target
            )
