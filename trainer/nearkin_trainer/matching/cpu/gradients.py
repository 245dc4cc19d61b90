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

from nearkin_trainer.matching.cpu.instructions import BLOCK, LINE, exchange, fetch
from nearkin_trainer.matching.cpu.layout import (
    EPSILON,
    Floats,
    Pairs,
    Places,
    Probes,
    Table,
    block_of,
    compiled,
    transpose,
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
def _through_length(
    tall: Floats, scales: Floats, lengths: Floats, visibility: Floats, gradients: Floats
) -> None:
    """Gradients of scaled locations [Q, 32], `tall`, become those of the locations themselves, in place."""
    for q in range(tall.shape[0]):
        # Below the floor the length is a constant, and only the scale remains.
        parallel = visibility[q] / lengths[q] if lengths[q] > EPSILON else np.float32(0)
        for c in range(BLOCK):
            gradients[q, c] = scales[q] * gradients[q, c] - parallel * tall[q, c]


@compiled
def _fetch_block(row: Floats, block: int) -> None:
    first = row.ctypes.data + block * BLOCK * row.strides[0]
    for line in range(0, BLOCK * row.strides[0], LINE):
        fetch(first + line)


@compiled
def backward(
    first: int, last: int, table: Table, pairs: Pairs, probes: Probes, given: Given, wanted: Wanted
) -> None:
    """Gradients for the classes ids[first:last]."""
    channels, locations = table.maps.shape[1:]
    count, batch, probe_locations = probes.units.shape[:3]
    tall, gradients = np.empty((locations, BLOCK), np.float32), np.empty((locations, BLOCK), np.float32)
    rows = wanted.rows.shape[0] > 0
    span = max(CACHED // (2 * 4 * BLOCK * batch * probe_locations), 1)
    if rows:
        for u in range(first, last):
            _along(u, pairs, given, wanted.visibility[u])
    wanted.units[:] = 0
    for start in range(0, count, span):
        for u in range(first, last):
            row, scales = table.maps[pairs.ids[u]], given.scales[u]
            following = table.maps[pairs.ids[min(u + 1, last - 1)]]
            for block in range(start, min(start + span, count)):
                _fetch_block(following, block)
                block_of(row, block, scales, tall)
                gradients[:] = 0
                for pair in pairs.pairs[pairs.starts[u] : pairs.starts[u + 1]]:
                    b = pair // pairs.candidates
                    _exchanged(pair, given, probes.units[block, b], wanted.units[block, b], tall, gradients)
                if rows:
                    _through_length(tall, scales, given.lengths[u], wanted.visibility[u], gradients)
                    top = min(BLOCK, channels - block * BLOCK)
                    transpose(gradients[:, :top], wanted.rows[u, block * BLOCK : block * BLOCK + top])


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
    tall = np.empty((unit_gradients.shape[1], locations, BLOCK), np.float32)
    ones = np.ones(locations, np.float32)
    for b in range(first, last):
        row, scales, lengths = table.maps[b], probes.scales[b], probes.lengths[b]
        along = visibility_gradients[b]
        along[:] = 0
        for block in range(tall.shape[0]):
            total = unit_gradients[0, block, b]
            # In order, so that the same threads give the same bits.
            for thread in range(1, unit_gradients.shape[0]):
                total += unit_gradients[thread, block, b]
            block_of(row, block, ones, tall[block])
            for p in range(locations):
                for c in range(BLOCK):
                    along[p] += tall[block, p, c] * total[p, c]
        for p in range(locations):
            along[p] /= max(lengths[p], EPSILON)
        for block in range(tall.shape[0]):
            total = unit_gradients[0, block, b]
            _through_length(probes.units[block, b], scales, lengths, along, total)
            top = min(BLOCK, channels - block * BLOCK)
            transpose(total[:, :top], map_gradients[b, block * BLOCK : block * BLOCK + top])
