"""Compiled loops that pick a query's best keys from its products with all of them, in the table's order.

Dimension letters: M keys, D elements of a key, N classes, Q queries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import uint32

from nearkin_service.engines.mixed.compiling import compiled
from nearkin_service.engines.mixed.products import add_products
from nearkin_service.engines.mixed.simd import WIDTH, count_bits, first_bit, reaching

STEP = 2.0**-22  # more than one step of a score, and than rounding it to float32


@compiled
def count_reaching(values: Any, least: Any) -> Any:
    """How many float32 are `least` or more; their number is a multiple of 32."""
    count, address = 0, values.ctypes.data
    for place in range(0, values.shape[0], WIDTH):
        count += count_bits(reaching(address + 4 * place, least))
    return count


@compiled
def threshold(values: Any, k: Any, guess: Any) -> Any:
    """A float32 that at least k of the values reach, and hardly more if they differ; they are above -2.5."""
    low, high = np.float32(-2.5), np.float32(1.5)
    middle, enough, step = guess, k + k // 8 + 4, np.float32(1 / 64)
    for _ in range(40):
        count = count_reaching(values, middle)
        if count < k:
            high = middle
            middle = max(low + (high - low) / np.float32(2), high - step)
        else:
            low = middle
            if count <= enough:
                break
            middle = min(low + (high - low) / np.float32(2), low + step)
        if low > np.float32(-2.5) and high < np.float32(1.5):
            middle = low + (high - low) / np.float32(2)
        else:
            step *= np.float32(4)
        if middle <= low or middle >= high:
            break
    return low


@compiled
def collect(values: Any, least: Any, places: Any) -> Any:
    """Write down where values are `least` or more, ascending; returns how many."""
    found = 0
    for start in range(0, values.shape[0], WIDTH):
        mask = reaching(values.ctypes.data + 4 * start, least)
        while mask != 0:
            places[found] = start + first_bit(mask)
            found += 1
            mask = mask & (mask - uint32(1))
    return found


@compiled
def rank_in_order(exact: Any, places: Any, names: Any, sure: Any, ranks: Any) -> Any:
    """Ranks of some scores, ascending, which hold the names of their places.

    Returns whether all scores are less than `sure` from a whole step.
    """
    certain = True
    for candidate in range(places.shape[0]):
        in_steps = min(1.0, max(-1.0, exact[candidate])) * 16777216.0
        steps = np.rint(in_steps)
        certain = certain and abs(in_steps - steps) <= sure
        ranks[candidate] = (-np.int64(steps) << 32) | np.int64(names[places[candidate]])
    ranks[: places.shape[0]].sort()
    return certain


@compiled
def rank_products(products: Any, own: Any, task: Any, scratch: Any) -> Any:
    """Ranks of a query's best keys, ascending, into the scratch, from its products with all keys.

    `own` is the place of the query's own key, or -1. `task` is the query, the keys, what ranks call each key,
    k, by how much products can be off (0: they are float64, and scores themselves), and how far from a whole
    step a score can be rounded safely. Returns how many ranks, and whether all could be rounded.
    """
    query, keys_MD, names, k, error, sure = task
    values, guess, places, exact, ranks = scratch
    count = products.shape[0]
    for place in range(count):
        values[place] = products[place]
    if own >= 0:
        values[own] = -4
    least = np.float32(-2)
    if k < count - (own >= 0):  # a step less, since scores tie once they are rounded and clipped
        guess[0] = threshold(values, k, guess[0])
        least = np.float32(max(-2.0, min(guess[0], 1.0) - 2 * error - STEP))
    found = collect(values, least, places)
    if error > 0:
        exact[:found] = 0.0
        add_products(query, keys_MD.reshape(-1), places, (0, found), exact)
    else:
        for candidate in range(found):
            exact[candidate] = products[places[candidate]]
    return found, rank_in_order(exact, places[:found], names, sure, ranks)


@compiled
def scratch_for(count: Any) -> Any:
    """What `rank_products` works in."""
    values = np.full((count + WIDTH - 1) // WIDTH * WIDTH, np.float32(-4))
    guess = np.full(1, np.float32(0.5))
    return values, guess, np.empty(count, np.int32), np.empty(count), np.empty(count, np.int64)


@compiled
def best_of_products(span: Any, from_products: Any, keys_MD: Any, table: Any, doubtful: Any) -> None:
    """Fill in the table's rows of a span of keys from their products with all keys.

    `from_products` is the products [M, M] and the last two of `rank_products`' task; `table` is the class of
    each key, ids [N, k] and scores [N, k]. A row is doubtful if a score that matters cannot be rounded.
    """
    products_MM, error, sure = from_products
    present, ids, scores = table
    k, query, names = ids.shape[1], np.empty(keys_MD.shape[1]), np.arange(keys_MD.shape[0])
    scratch = scratch_for(products_MM.shape[0])
    for row in range(span[0], span[1]):
        if error > 0:
            query[:] = keys_MD[row]
        task = query, keys_MD, names, k, error, sure
        found, certain = rank_products(products_MM[row], row, task, scratch)
        doubtful[row] = not certain
        ranks, own = scratch[4], present[row]
        for place in range(min(k, found)):
            ids[own, place] = present[ranks[place] & 0xFFFFFFFF]
            scores[own, place] = -(ranks[place] >> 32) / 16777216.0


@compiled
def best_of_panel(products_QM: Any, queries: Any, task: Any, ranks_Qk: Any, doubtful: Any) -> None:
    """The k best ranks of each query from its float32 products with all keys.

    `queries` is their keys and own places; `task` is `rank_products`' but for the query and k.
    """
    queries_QD, own_Q = queries
    keys_MD, names, error, sure = task
    k, query = ranks_Qk.shape[1], np.empty(keys_MD.shape[1])
    scratch = scratch_for(keys_MD.shape[0])
    for row in range(queries_QD.shape[0]):
        query[:] = queries_QD[row]
        found, certain = rank_products(
            products_QM[row], own_Q[row], (query, keys_MD, names, k, error, sure), scratch
        )
        doubtful[row] = not certain
        kept = min(k, found)
        ranks_Qk[row, :kept] = scratch[4][:kept]
