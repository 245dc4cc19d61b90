# ruff: noqa: PLR0917 (compiled functions take no keywords)
"""The compiled loops of the CPU backend: one class at a time, everything about it in this core's cache.

Forward, for each class: read its row once; lay it out for the tile and, transposed, for exact dot products;
for each probe that wants it, products by tiles, then the maxima.

The tile's products are bfloat16 where the processor has them, and serve to *find* the maxima. Rounding moves
a sim by at most `BOUND` of its largest possible value, so whatever lies within twice that of the best is
measured again in float32, and the best of these wins: values and argmax are those of float32 products.

Backward, for each class: a maximum's gradient goes to one pair of locations, so that a pair of maps costs
P + Q row updates in place of two matrix products.

P probe locations, Q class locations, C channels padded to 32 with zeros, q columns padded to 16.
Maps of a probe are [P, C] (units); a class is [C, Q] in the table, `tall` [Q, C] and `wide` [C/2, q, 2] here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nearkin_trainer.matching.cpu.instructions import (
    HAS_BF16,
    MOST_VECTORS,
    ROWS,
    add_both,
    float_bits,
    highest,
    hits,
    lowest_bit,
    product_tile,
    transpose_16,
)

EPSILON = np.float32(1e-12)
# Two factors rounded to 8 bits move a product by at most 2^-8 of |a||b|; float32 sums by far less than 2^-12.
BOUND = np.float32(2.0**-8 * 1.06 if HAS_BF16 else 2.0**-12)
STEP_CHANNELS = 2 if HAS_BF16 else 1
Floats = NDArray[np.float32]
Bits = NDArray[np.uint32]
Places = NDArray[np.int16]
Ids = NDArray[np.int64]
Loop = TypeVar("Loop", bound=Callable[..., Any])


def compiled(function: Loop) -> Loop:
    """Compile with sums reordered into vectors; NaN and infinity keep their meaning."""
    return cast("Loop", _njit(function, fastmath={"contract", "reassoc", "nsz"}))


def strict(function: Loop) -> Loop:
    """Compile as written."""
    return cast("Loop", _njit(function))


def _njit(function: Callable[..., Any], **options: Any) -> Any:
    try:
        return njit(nogil=True, error_model="numpy", cache=True, **options)(function)
    except RuntimeError:  # nowhere to write: compile in every process
        return njit(nogil=True, error_model="numpy", **options)(function)


@compiled
def _dot(a: Floats, b: Floats) -> np.float32:
    total = np.float32(0)
    for c in range(a.shape[0]):
        total += a[c] * b[c]
    return total


@compiled
def _transpose(source: Floats, target: Floats) -> None:
    """target[:columns, :rows] = source.T, by blocks; a last partial block overlaps its neighbour."""
    rows, columns = source.shape
    if rows < 16 or columns < 16:
        for column in range(columns):
            for row in range(rows):
                target[column, row] = source[row, column]
        return
    for row_block in range(0, rows, 16):
        row = min(row_block, rows - 16)
        for column_block in range(0, columns, 16):
            column = min(column_block, columns - 16)
            transpose_16(
                source.ctypes.data + row * source.strides[0] + column * 4,
                source.strides[0],
                target.ctypes.data + column * target.strides[0] + row * 4,
                target.strides[0],
            )


@compiled
def _lengths(row: Floats, visibility: Floats, scales: Floats, lengths: Floats) -> np.float32:
    """Lengths are |row[:, q]|, scales visibility / length (padding: 0); returns the top |visibility|."""
    channels, locations = row.shape
    lengths[:] = 0
    for c in range(channels):
        for q in range(locations):
            lengths[q] += row[c, q] * row[c, q]
    scales[:] = 0
    largest = np.float32(0)
    for q in range(locations):
        lengths[q] = np.sqrt(lengths[q])
        scales[q] = visibility[q] / max(lengths[q], EPSILON)
        largest = max(largest, abs(visibility[q]))
    return largest


@compiled
def _of(visibility: Floats, index: int) -> Floats:
    row: Floats = visibility[index if visibility.shape[0] > 1 else 0]
    return row


@compiled
def _rounded(value: np.float32) -> np.uint32:
    """The bits of a float32 after rounding it to bfloat16, ties to even, in the upper half."""
    bits: np.uint32 = float_bits(value)
    return bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))


@compiled
def _widen(row: Floats, wide: Bits) -> None:
    """Lay a class [C, Q] out for the tile: wide[step, q] is one channel of q, or two in bfloat16."""
    channels, locations = row.shape
    for step in range((channels + STEP_CHANNELS - 1) // STEP_CHANNELS):
        if not HAS_BF16:
            for q in range(locations):
                wide[step, q] = float_bits(row[step, q])
        elif 2 * step + 1 < channels:
            for q in range(locations):
                high = _rounded(row[2 * step + 1, q]) & np.uint32(0xFFFF0000)
                wide[step, q] = (_rounded(row[2 * step, q]) >> np.uint32(16)) | high
        else:
            for q in range(locations):
                wide[step, q] = _rounded(row[2 * step, q]) >> np.uint32(16)


@compiled
def _products(probe: Bits, wide: Bits, sims: Floats) -> None:
    """Sims [P, q] of a probe [P, steps] and a class [steps, q], both as laid out for the tile."""
    locations, steps = probe.shape
    vectors = wide.shape[1] // 16
    for first in range(0, vectors, MOST_VECTORS):
        for p in range(0, locations, ROWS):
            product_tile(
                min(ROWS, locations - p),
                min(MOST_VECTORS, vectors - first),
                probe.ctypes.data + p * probe.strides[0],
                probe.strides[0],
                wide.ctypes.data + first * 64,
                wide.strides[0],
                steps,
                sims.ctypes.data + p * sims.strides[0] + first * 64,
                sims.strides[0],
            )


@compiled
def _bounds(
    sims: Floats, scales: Floats, locations: int, slack: np.float32, row_bounds: Floats, column_bounds: Floats
) -> None:
    """Scale the sims; what reaches these bounds may be the maximum of its row or column."""
    column_bounds[:] = -np.inf
    for p in range(sims.shape[0]):
        row = sims[p]
        for q in range(row.shape[0]):
            row[q] *= scales[q]
            column_bounds[q] = row[q] if row[q] > column_bounds[q] else column_bounds[q]
        # The padding's sims are 0 and must not be anyone's maximum.
        row[locations:] = -np.inf
        row_bounds[p] = highest(row.ctypes.data, row.shape[0] // 16) - slack
    for q in range(sims.shape[1]):
        column_bounds[q] = column_bounds[q] - slack if q < locations else np.inf


@compiled
def _measured(
    probe: Floats,
    tall: Floats,
    scales: Floats,
    sims: Floats,
    row_bounds: Floats,
    column_bounds: Floats,
    maxima: Floats,
    where: Places,
) -> None:
    """Exact maxima and their places: float32 products of every pair of locations that may be one."""
    locations = probe.shape[0]
    maxima[:] = -np.inf
    where[:] = 0
    for p in range(locations):
        for block in range(0, sims.shape[1], 16):
            found = hits(
                sims.ctypes.data + p * sims.strides[0] + block * 4,
                column_bounds.ctypes.data + block * 4,
                row_bounds[p],
            )
            while found != 0:
                q = block + lowest_bit(found)
                found &= found - 1
                sim = _dot(probe[p], tall[q]) * scales[q]
                if sim > maxima[p]:
                    maxima[p] = sim
                    where[p] = q
                if sim > maxima[locations + q]:
                    maxima[locations + q] = sim
                    where[locations + q] = p


@strict
def _strictly_measured(probe: Floats, tall: Floats, scales: Floats, maxima: Floats, where: Places) -> None:
    """As `_measured`, for maps with NaN or infinity in them: the first NaN wins its row and its column."""
    locations = probe.shape[0]
    maxima[:] = -np.inf
    where[:] = 0
    for p in range(locations):
        for q in range(tall.shape[0]):
            sim = np.float32(0)
            for c in range(probe.shape[1]):
                sim += probe[p, c] * tall[q, c]
            sim *= scales[q]
            for place, other in ((p, q), (locations + q, p)):
                if sim > maxima[place] or (np.isnan(sim) and not np.isnan(maxima[place])):
                    maxima[place] = sim
                    where[place] = other


@strict
def _all_finite(values: Floats) -> bool:
    return bool(np.all(np.isfinite(values)))


class Probes(NamedTuple):
    """Every probe, laid out by `prepare`.

    units: float32 [B, P, C], visibility · unit length. tiles: [B, P, steps], the same for the tile.
    scales: [B, P], visibility / length. lengths: [B, P]. tops: [B], the top |visibility|, or NaN.
    """

    units: Floats
    tiles: Bits
    scales: Floats
    lengths: Floats
    tops: Floats


class Pairs(NamedTuple):
    """The pairs (probe · candidates + candidate) of a step, grouped by the class they want.

    ids: int64 [U], the classes. starts: int64 [U + 1] into pairs. candidates: M, to find a pair's probe.
    """

    ids: Ids
    starts: Ids
    pairs: Ids
    candidates: int


class Table(NamedTuple):
    """maps: float32 [N, C, Q]. visibility: float32 [U, Q], of the touched classes, or [1, Q] for all."""

    maps: Floats
    visibility: Floats


@compiled
def prepare(first: int, last: int, table: Table, probes: Probes) -> None:
    """Lay out the probes first to last, whose maps and visibilities `table` holds."""
    for b in range(first, last):
        scales, lengths, units = probes.scales[b], probes.lengths[b], probes.units[b]
        top = _lengths(table.maps[b], _of(table.visibility, b), scales, lengths)
        probes.tops[b] = top if _all_finite(lengths) and _all_finite(scales) else np.nan
        _transpose(table.maps[b], units)
        for p in range(units.shape[0]):
            for c in range(units.shape[1]):
                units[p, c] *= scales[p]
            for step in range(probes.tiles.shape[2]):
                if HAS_BF16:
                    high = _rounded(units[p, 2 * step + 1]) & np.uint32(0xFFFF0000)
                    probes.tiles[b, p, step] = (_rounded(units[p, 2 * step]) >> np.uint32(16)) | high
                else:
                    probes.tiles[b, p, step] = float_bits(units[p, step])


@compiled
def forward(
    first: int, last: int, table: Table, pairs: Pairs, probes: Probes, maxima: Floats, where: Places
) -> None:
    """Maxima [B · M, P + Q] and their places, for the classes ids[first:last]."""
    probe_locations, locations = probes.units.shape[1], table.maps.shape[2]
    padded = (locations + 15) // 16 * 16
    wide = np.zeros((probes.tiles.shape[2], padded), np.uint32)
    tall = np.zeros((locations, probes.units.shape[2]), np.float32)
    sims = np.empty((probe_locations, padded), np.float32)
    scales, lengths = np.empty(padded, np.float32), np.empty(padded, np.float32)
    row_bounds, column_bounds = np.empty(probe_locations, np.float32), np.empty(padded, np.float32)
    for u in range(first, last):
        row = table.maps[pairs.ids[u]]
        top = _lengths(row, _of(table.visibility, u), scales, lengths)
        finite = _all_finite(lengths) and _all_finite(scales)
        _transpose(row, tall)
        _widen(row, wide)
        for pair in pairs.pairs[pairs.starts[u] : pairs.starts[u + 1]]:
            b = pair // pairs.candidates
            units, found, places = probes.units[b], maxima[pair], where[pair]
            if finite and np.isfinite(probes.tops[b]):
                _products(probes.tiles[b], wide, sims)
                slack = np.float32(2) * BOUND * top * probes.tops[b]
                _bounds(sims, scales, locations, slack, row_bounds, column_bounds)
                _measured(units, tall, scales, sims, row_bounds, column_bounds, found, places)
            else:
                _strictly_measured(units, tall, scales, found, places)


@compiled
def _spread(
    weight: np.float32,
    unit: Floats,
    tall_row: Floats,
    scale: np.float32,
    unit_gradient: Floats,
    class_gradient: Floats,
) -> None:
    """The gradient `weight` of one sim, to both its locations."""
    add_both(
        weight,
        weight * scale,
        unit.ctypes.data,
        tall_row.ctypes.data,
        unit_gradient.ctypes.data,
        class_gradient.ctypes.data,
        unit.shape[0] // 16,
    )


@compiled
def _through_length(
    tall: Floats, scales: Floats, lengths: Floats, gradients: Floats, visibility_gradients: Floats
) -> None:
    """Gradients of normalised locations [Q, C] become, in place, those of the locations themselves."""
    for q in range(tall.shape[0]):
        length = max(lengths[q], EPSILON)
        along = _dot(tall[q], gradients[q]) / length
        visibility_gradients[q] = along
        # Below the floor the length is a constant, and only the scale remains.
        parallel = scales[q] * along / length if lengths[q] > EPSILON else np.float32(0)
        for c in range(tall.shape[1]):
            gradients[q, c] = scales[q] * gradients[q, c] - parallel * tall[q, c]


@compiled
def backward(
    first: int,
    last: int,
    table: Table,
    pairs: Pairs,
    probes: Probes,
    where: Places,
    weights: Floats,
    unit_gradients: Floats,
    row_gradients: Floats,
    visibility_gradients: Floats,
) -> None:
    """Gradients from `weights` [B · M, P + Q], those of the maxima, for the classes ids[first:last].

    unit_gradients [B, P, C] is added to. row_gradients [U, C, Q] and visibility_gradients [U, Q] are written
    unless they have no rows.
    """
    channels, locations = table.maps.shape[1], table.maps.shape[2]
    probe_locations = probes.units.shape[1]
    tall = np.zeros((locations, probes.units.shape[2]), np.float32)
    gradients = np.empty((locations, probes.units.shape[2]), np.float32)
    scales, lengths = np.empty(locations, np.float32), np.empty(locations, np.float32)
    for u in range(first, last):
        row = table.maps[pairs.ids[u]]
        _lengths(row, _of(table.visibility, u), scales, lengths)
        _transpose(row, tall)
        gradients[:] = 0
        for pair in pairs.pairs[pairs.starts[u] : pairs.starts[u + 1]]:
            b = pair // pairs.candidates
            for p in range(probe_locations):
                q = where[pair, p]
                weight = weights[pair, p]
                _spread(weight, probes.units[b, p], tall[q], scales[q], unit_gradients[b, p], gradients[q])
            for q in range(locations):
                p = where[pair, probe_locations + q]
                weight = weights[pair, probe_locations + q]
                _spread(weight, probes.units[b, p], tall[q], scales[q], unit_gradients[b, p], gradients[q])
        if row_gradients.shape[0]:
            _through_length(tall, scales, lengths, gradients, visibility_gradients[u])
            _transpose(gradients[:, :channels], row_gradients[u])


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
    """Gradients [B, C, P] and [B, P] of the probes, from those of their units [threads, B, P, C]."""
    channels = table.maps.shape[1]
    tall = np.zeros(unit_gradients.shape[2:], np.float32)
    for b in range(first, last):
        total = unit_gradients[0, b]
        # In order, so that the same threads give the same bits.
        for thread in range(1, unit_gradients.shape[0]):
            total += unit_gradients[thread, b]
        _transpose(table.maps[b], tall)
        _through_length(tall, probes.scales[b], probes.lengths[b], total, visibility_gradients[b])
        _transpose(total[:, :channels], map_gradients[b])
