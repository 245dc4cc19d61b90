# ruff: noqa: PLR0917 (compiled functions take no keywords)
"""Forward's products in fixed point: they tell which few pairs of locations float32 has to measure.

A processor that multiplies 32 pairs of int16 as one instruction takes half the time for them that it takes
for float32. Units are rounded to int16, so that a sim is off by no more than is known beforehand. What may be
a maximum is then measured, each sum through the channels in order, as the tiles of float32 do: both give
the same bits.

P probe locations, Q class locations, C channels. Both maps have 3 times 16 locations and a few more, or 4
times 16. Sims in fixed point are in units of UTMOST⁻² · (the top visibilities of both maps).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin_trainer.matching.cpu.fixed_instructions import (
    MOST,
    chosen_sums,
    first_bit,
    fix_pairs,
    raise_tops,
    reach,
    reach_each,
)
from nearkin_trainer.matching.cpu.instructions import LANES
from nearkin_trainer.matching.cpu.layout import Floats, Places, Probes, Table, compiled, lines, strict
from nearkin_trainer.matching.cpu.tiles import products, rest_products

UTMOST = 32766.0
FAINT = np.float32(1e-6)  # visibilities below which factors might not be normal numbers
LISTED = 2 * LANES  # candidates beside the first of each row and column, at most
LOWEST, HIGHEST = np.int32(-(2**31)), np.int32(2**31 - 1)

Ints = NDArray[np.int32]


class Fixed(NamedTuple):
    """Room for one pair of maps.

    row: [C / 2, 64], the class, see `fix_pairs`. factors: what its locations were multiplied by.
    sims: [Q, 64]. rest: [P − columns, 64], sims of the probe's few locations beyond the columns.
    window: how far below the highest of these sims the highest of float32 may be.
    row_tops, row_places: [Q], column_tops, column_places: [64], the highest sims and the first candidates; −1
    where these are among the listed. listed: [2, LISTED], the p and q of candidates. places, sums: of all
    that is measured, see `chosen_sums`; of listed pairs 16 by 16.
    """

    row: Ints
    factors: Floats
    sims: Ints
    rest: Ints
    columns: int
    window: np.int32
    row_tops: Ints
    row_places: Ints
    column_tops: Ints
    column_places: Ints
    listed: Ints
    places: Ints
    sums: Floats


@compiled
def fixed_room(channels: int, locations: int, columns: int, rest: int) -> Fixed:
    """Uninitialised, but for sims that no location has, which are the lowest."""
    sims = lines(locations, MOST).view(np.int32)
    sims[:] = LOWEST
    return Fixed(
        lines((channels + 1) // 2, MOST).view(np.int32),
        np.empty(locations, np.float32),
        sims,
        np.empty((rest, MOST), np.int32),
        columns,
        _window(channels),
        np.empty(locations, np.int32),
        np.empty(locations, np.int32),
        np.empty(MOST, np.int32),
        np.empty(MOST, np.int32),
        np.empty((2, LISTED), np.int32),
        np.empty(2 * MOST + 2 * LISTED, np.int32),
        np.empty(2 * MOST + LISTED, np.float32),
    )


@compiled
def _window(channels: int) -> np.int32:
    # Each element is rounded by half a unit at most, so that a location is off by half a root of the
    # channels, and multiplied by one of length UTMOST. Both are; and the product of both errors.
    rounding = UTMOST * np.sqrt(channels) + channels / 4
    # Float32 rounds each of the sums, its products, the lengths and the factors.
    float32 = UTMOST**2 * (channels + 8) * 2.0**-24
    # One sim may be too high by that, and the other too low.
    return np.int32(2 * 1.001 * (rounding + float32) + 2)


@compiled
def fix(row: Floats, scales: Floats, top: np.float32, factors: Floats, target: Ints) -> None:
    """Lay out a map [C, Q] in fixed point, target [C / 2, 64]; `top` is the highest of its visibilities."""
    channels, locations = row.shape
    for q in range(locations):
        factors[q] = scales[q] * np.float32(UTMOST / top)
    fix_pairs(
        locations // LANES,
        (1 << locations % LANES) - 1,
        row.ctypes.data,
        row.strides[0],
        channels,
        factors.ctypes.data,
        target.ctypes.data,
    )


@compiled
def fix_probes(first: int, last: int, maps: Table, probes: Probes) -> None:
    """Lay out the probes first to last, as far as they can be."""
    factors = np.empty(maps.maps.shape[2], np.float32)
    for b in range(first, last):
        if probes.tops[b] >= FAINT:
            fix(maps.maps[b], probes.scales[b], probes.tops[b], factors, probes.fixed[b])


@strict
def find(
    fixed: Fixed,
    row: Floats,
    scales: Floats,
    panel: Floats,
    fixed_panel: Ints,
    ahead: int,
    maxima: Floats,
    where: Places,
    dots: Floats,
) -> bool:
    """Maxima of a pair of maps; False, and none, if there are too many candidates. fixed.row: the class.

    From `ahead` on, the next class is fetched.
    """
    channels, locations = row.shape
    pairs, size = fixed.row.shape[0], channels * row.strides[0]
    products(fixed.row[:, :locations], fixed_panel, fixed.columns, fixed.sims, 0, pairs, ahead, size)
    if fixed.rest.shape[0]:
        rest_products(fixed.row, fixed_panel, fixed.columns, fixed.rest, 0, pairs)
    count = _candidates(fixed, maxima.shape[0] - locations)
    if count > LISTED:
        return False
    count = _arrange(fixed, maxima.shape[0] - locations, locations, count)
    if count > LISTED:
        return False
    _measure(fixed, count, row, panel, maxima.shape[0] - locations)
    _choose(fixed, count, scales, maxima, where, dots)
    return True


@compiled
def _listed(fixed: Fixed, count: int, p: int, q: int) -> int:
    if count < LISTED:
        fixed.listed[0, count] = p
        fixed.listed[1, count] = q
    return count + 1


@compiled
def _candidates(fixed: Fixed, probe_locations: int) -> int:
    """The first place where each row's and column's maximum may be; others are listed. How many are."""
    sims, tops, locations = fixed.sims, fixed.column_tops, fixed.row_tops.shape[0]
    for p in range(fixed.columns, probe_locations):
        for q in range(locations):
            sims[q, p] = fixed.rest[p - fixed.columns, q]
    raise_tops(sims.ctypes.data, locations, fixed.row_tops.ctypes.data, tops.ctypes.data)
    for p in range(MOST):
        tops[p] = tops[p] - fixed.window if p < probe_locations else HIGHEST
    seen, count = 0, 0
    for q in range(locations):
        address = sims.ctypes.data + q * sims.strides[0]
        some = reach(address, np.int32(fixed.row_tops[q] - fixed.window))
        fixed.row_places[q] = first_bit(some)
        some &= some - 1
        while some:
            count = _listed(fixed, count, first_bit(some), q)
            some &= some - 1
        some = reach_each(address, tops.ctypes.data)
        again = some & seen
        some ^= again
        seen |= some
        while some:
            fixed.column_places[first_bit(some)] = q
            some &= some - 1
        while again:
            count = _listed(fixed, count, first_bit(again), q)
            again &= again - 1
        if count > LISTED:
            break
    return count


@compiled
def _arrange(fixed: Fixed, probe_locations: int, locations: int, count: int) -> int:
    """Fill the places of whole vectors; what has a location beyond them is listed too. How many are."""
    columns, rows = probe_locations // LANES * LANES, locations // LANES * LANES
    for p in range(probe_locations):
        q = fixed.column_places[p]
        whole = p < columns and q < rows
        if p < columns:
            fixed.places[p] = q if whole else 0
        if not whole:
            count = _listed(fixed, count, p, q)
            fixed.column_places[p] = -1
    for q in range(locations):
        p = fixed.row_places[q]
        whole = p < columns and q < rows
        if q < rows:
            fixed.places[columns + q] = p if whole else 0
        if not whole:
            count = _listed(fixed, count, p, q)
            fixed.row_places[q] = -1
    return count


@compiled
def _lane(location: int, locations: int) -> int:
    """Where a location is in whole vectors and one more that ends with the last location."""
    whole = locations // LANES * LANES
    return location if location < whole else location + whole + LANES - locations


@compiled
def _measure(fixed: Fixed, count: int, row: Floats, panel: Floats, probe_locations: int) -> None:
    channels, locations = row.shape
    vectors, others = probe_locations // LANES, locations // LANES
    columns, places = vectors * LANES, fixed.places
    end = columns + others * LANES
    for i in range(LISTED):
        at = end + 2 * (i - i % LANES) + i % LANES
        places[at] = fixed.listed[0, i] if i < count else 0
        places[at + LANES] = _lane(fixed.listed[1, i], locations) if i < count else 0
    fixed.sums[:] = 0
    for group in range(0, max(count, 1), LANES):
        chosen_sums(
            group > 0,
            vectors,
            others,
            panel.ctypes.data,
            panel.strides[0],
            4 * columns,
            row.ctypes.data,
            row.strides[0],
            4 * (locations - LANES),
            places.ctypes.data + 4 * (end + 2 * group if group else 0),
            channels,
            fixed.sums.ctypes.data + 4 * (end + group if group else 0),
        )


@compiled
def _choose(fixed: Fixed, count: int, scales: Floats, maxima: Floats, where: Places, dots: Floats) -> None:
    locations, sums = scales.shape[0], fixed.sums
    probe_locations = maxima.shape[0] - locations
    columns = probe_locations // LANES * LANES
    end = columns + locations // LANES * LANES
    for p in range(probe_locations):
        q = fixed.column_places[p]
        dots[p], where[p] = sums[p], q
        maxima[p] = sums[p] * scales[q] if q >= 0 else -np.inf
    for q in range(locations):
        p, place = fixed.row_places[q], probe_locations + q
        dots[place], where[place] = sums[columns + q], p
        maxima[place] = sums[columns + q] * scales[q] if p >= 0 else -np.inf
    for i in range(count):
        one, two, dot = np.int64(fixed.listed[0, i]), np.int64(fixed.listed[1, i]), sums[end + i]
        sim = dot * scales[two]
        for place, other in ((one, two), (probe_locations + two, one)):
            if sim > maxima[place] or (sim == maxima[place] and other < where[place]):
                maxima[place], where[place], dots[place] = sim, other, dot
