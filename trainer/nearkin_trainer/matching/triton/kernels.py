# ruff: noqa: PLR0917 (kernels take no keywords)
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Fused kernels of the location-wise matching operation.

    sims[p, q] = scale_p · scale_q · Σ_c probe[c, p] · class[c, q]          scale = visibility / length
    maxima     = max over q, and max over p, of the same accumulator

    W[o, t]    = g_o · [best of o is t] + g_t · [best of t is o]
    D[o, c]    = Σ_t W[o, t] · scale_t · other[c, t]             summed over the pairs of this map
    T[o]       = Σ_t W[o, t] · sims[o, t]                        = scale_o · Σ_c own[c, o] · D[o, c]
    gradient of own[c, o]       = scale_o · D[o, c] − own[c, o] · T[o] / length_o²
    gradient of visibility_o    = Σ_c own[c, o] · D[o, c] / length_o

Class rows are read from the table by index, never copied. Each gradient is written by one program: there are
no atomics, and the same input gives the same bits.

C channels, P probe and Q class locations, O own and T other locations; BP, BQ, BO, BT, BC tiles of them.
Maps are [C, locations], row-major. Offsets are int64: a table may hold more than 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lengths(maps, rows, out, C, Q, BQ: tl.constexpr, BC: tl.constexpr):
    """out[u, q] = |maps[rows[u], :, q]|; one program per (u, tile of q)."""
    u = tl.program_id(0).to(tl.int64)
    q = tl.program_id(1) * BQ + tl.arange(0, BQ)
    start = maps + tl.load(rows + u) * C * Q
    total = tl.zeros([BQ], tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        inside = (c < C)[:, None] & (q < Q)[None, :]
        tile = tl.load(start + c[:, None] * Q + q[None, :], inside, 0.0).to(tl.float32)
        total += tl.sum(tile * tile, axis=0)
    tl.store(out + u * Q + q, tl.sqrt(total), q < Q)


@triton.jit
def maxima(
    probes,
    classes,
    pairs,
    class_rows,
    class_slots,
    probe_scales,
    class_scales,
    out,
    where,
    M,
    C,
    P,
    Q,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
    TILES_P: tl.constexpr,
    TILES_Q: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Both maxima of a pair, and where they are; one program per pair, those of a class in a row."""
    pair = tl.load(pairs + tl.program_id(0))
    b = pair // M
    probe = probes + b * C * P
    row = classes + tl.load(class_rows + pair) * C * Q
    q_scales = class_scales + tl.load(class_slots + pair) * Q
    tiles = tl.arange(0, TILES_Q)
    best_q = tl.full([TILES_Q, BQ], float("-inf"), tl.float32)
    where_q = tl.zeros([TILES_Q, BQ], tl.int32)
    for tile_p in range(TILES_P):
        p = tile_p * BP + tl.arange(0, BP)
        p_scale = tl.load(probe_scales + b * P + p, p < P, 0.0)
        best_p = tl.full([BP], float("-inf"), tl.float32)
        where_p = tl.zeros([BP], tl.int32)
        for tile_q in range(TILES_Q):
            q = tile_q * BQ + tl.arange(0, BQ)
            sims = tl.zeros([BP, BQ], tl.float32)
            for c0 in range(0, C, BC):
                c = c0 + tl.arange(0, BC)
                left = tl.load(probe + c[None, :] * P + p[:, None], (c < C)[None, :] & (p < P)[:, None], 0.0)
                right = tl.load(row + c[:, None] * Q + q[None, :], (c < C)[:, None] & (q < Q)[None, :], 0.0)
                sims = tl.dot(left.to(DTYPE), right.to(DTYPE), sims, input_precision=PRECISION)
            sims *= p_scale[:, None] * tl.load(q_scales + q, q < Q, 0.0)[None, :]
            # NaN wins, as in torch.max; no cosine reaches infinity by itself.
            nan = sims != sims  # noqa: PLR0124
            sims = tl.where(nan, float("inf"), sims)
            sims = tl.where((p < P)[:, None] & (q < Q)[None, :], sims, float("-inf"))
            found_p, at_p = tl.max(sims, axis=1, return_indices=True)
            where_p = tl.where(found_p > best_p, at_p + tile_q * BQ, where_p)
            best_p = tl.maximum(found_p, best_p)
            found_q, at_q = tl.max(sims, axis=0, return_indices=True)
            better = (tiles == tile_q)[:, None] & (found_q[None, :] > best_q)
            where_q = tl.where(better, (at_q + tile_p * BP)[None, :], where_q)
            best_q = tl.where(better, found_q[None, :], best_q)
        place = pair * (P + Q) + p
        tl.store(out + place, tl.where(best_p == float("inf"), float("nan"), best_p), p < P)
        tl.store(where + place, where_p, p < P)
    q = tiles[:, None] * BQ + tl.arange(0, BQ)[None, :]
    place = pair * (P + Q) + P + q
    tl.store(out + place, tl.where(best_q == float("inf"), float("nan"), best_q), q < Q)
    tl.store(where + place, where_q, q < Q)


@triton.jit
def side_gradient(
    own,
    own_rows,
    own_scales,
    own_lengths,
    other,
    other_rows,
    other_slots,
    other_scales,
    starts,
    pairs,
    weights,
    found,
    where,
    gradient,
    visibility_gradient,
    C,
    O,  # noqa: E741
    T,
    own_half,
    other_half,
    FLOOR: tl.constexpr,
    BO: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
    VISIBILITY: tl.constexpr,
):
    """The gradient of one map of one side (probes or classes): one program per (map, tile of o, tile of c).

    own_half and other_half: where the maxima of own and of other locations begin in a pair's O + T.
    visibility_gradient [maps, tiles of c, O]: this tile's part of the sum over channels.
    """
    item = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    sums = tl.zeros([BO, BC], tl.float32)
    along = tl.zeros([BO], tl.float32)
    for i in range(tl.load(starts + item), tl.load(starts + item + 1)):
        pair = tl.load(pairs + i)
        base = pair * (O + T)
        row = other + tl.load(other_rows + pair) * C * T
        scales = other_scales + tl.load(other_slots + pair) * T
        g_o = tl.load(weights + base + own_half + o, o < O, 0.0)
        at_o = tl.load(where + base + own_half + o, o < O, 0).to(tl.int32)
        along += g_o * tl.load(found + base + own_half + o, o < O, 0.0)
        for t0 in range(0, T, BT):
            t = t0 + tl.arange(0, BT)
            g_t = tl.load(weights + base + other_half + t, t < T, 0.0)
            at_t = tl.load(where + base + other_half + t, t < T, 0).to(tl.int32)
            best_t = tl.load(found + base + other_half + t, t < T, 0.0)
            chosen = (at_t[None, :] == o[:, None]) & (t < T)[None, :]
            along += tl.sum(tl.where(chosen, (g_t * best_t)[None, :], 0.0), axis=1)
            spread = tl.where(at_o[:, None] == t[None, :], g_o[:, None], 0.0)
            spread += tl.where(chosen, g_t[None, :], 0.0)
            spread *= tl.load(scales + t, t < T, 0.0)[None, :]
            tile = tl.load(row + c[None, :] * T + t[:, None], (c < C)[None, :] & (t < T)[:, None], 0.0)
            sums = tl.dot(spread, tile.to(tl.float32), sums, input_precision=PRECISION)
    inside = (o < O)[:, None] & (c < C)[None, :]
    start = own + tl.load(own_rows + item) * C * O
    mine = tl.load(start + c[None, :] * O + o[:, None], inside, 0.0).to(tl.float32)
    length = tl.load(own_lengths + item * O + o, o < O, 1.0)
    floored = tl.maximum(length, FLOOR)
    # Below the floor the length is a constant, and only the scale remains.
    parallel = tl.where(length > FLOOR, along / (floored * floored), 0.0)
    scale = tl.load(own_scales + item * O + o, o < O, 0.0)
    result = scale[:, None] * sums - mine * parallel[:, None]
    tl.store(gradient + item * C * O + c[None, :] * O + o[:, None], result, inside)
    if VISIBILITY:
        part = (item * tl.num_programs(2) + tl.program_id(2)) * O + o
        tl.store(visibility_gradient + part, tl.sum(mine * sums, axis=1) / floored, o < O)
