"""Inner products of listed pairs of keys, as fast as the keys come from cache.

Dimension letters: U keys, E elements of a key or of a part of it, P pairs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import uint64
from numpy.typing import NDArray

from nearkin_service.engines.mixed.compiling import compiled, compiled_loosely

_LINE = 64
_CACHED, _WORTH_A_QUERY = 1 << 23, 4  # bytes of keys; pairs of a query for which it pays to load it again


def aligned(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """An array that begins where a cache line does: loads that straddle two lines take twice as long."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return np.asarray(memory[start : start + size].view(dtype).reshape(shape))


@compiled_loosely
def add_products(query: Any, keys: Any, others: Any, span: Any, products: Any) -> None:
    """Add one query's products with the keys that a span of `others` lists, to a span of float64 sums.

    `keys` is [M * D], the keys one after the other. What one call adds to a sum is computed in the query's
    type; four sums at once, so that loads overlap. Places are unsigned, since numba lets others be negative.
    """
    size, pair, end = uint64(query.shape[0]), uint64(span[0]), uint64(span[1])
    zero = query.dtype.type(0)
    while pair + uint64(4) <= end:
        key_0 = uint64(others[pair]) * size
        key_1 = uint64(others[pair + uint64(1)]) * size
        key_2 = uint64(others[pair + uint64(2)]) * size
        key_3 = uint64(others[pair + uint64(3)]) * size
        sum_0, sum_1, sum_2, sum_3 = zero, zero, zero, zero
        for column in range(size):
            value = query[column]
            sum_0 += value * query.dtype.type(keys[key_0 + column])
            sum_1 += value * query.dtype.type(keys[key_1 + column])
            sum_2 += value * query.dtype.type(keys[key_2 + column])
            sum_3 += value * query.dtype.type(keys[key_3 + column])
        products[pair] += sum_0
        products[pair + uint64(1)] += sum_1
        products[pair + uint64(2)] += sum_2
        products[pair + uint64(3)] += sum_3
        pair += uint64(4)
    while pair < end:
        key = uint64(others[pair]) * size
        total = zero
        for column in range(size):
            total += query[column] * query.dtype.type(keys[key + column])
        products[pair] += total
        pair += uint64(1)


@compiled
def add_pair_products(keys_UE: Any, owners: Any, pairs: Any, query_E: Any, products: Any) -> None:
    """Add to each pair's float64 sum the product of its keys, computed in the type of `query_E`.

    `pairs` is where each owner's pairs begin and the other key of each, ascending. The pairs of all owners
    with so many keys that they stay in cache come first, then those with the next keys.
    """
    starts, others = pairs
    keys, count = keys_UE.reshape(-1), keys_UE.shape[0]
    blocks = max(1, min(keys.nbytes // _CACHED, others.shape[0] // (_WORTH_A_QUERY * owners.shape[0] + 1)))
    block = (count + blocks - 1) // blocks
    begun = starts[:-1].copy()
    for end in range(block, count + block, block):
        for row in range(owners.shape[0]):
            first = last = begun[row]
            while last < starts[row + 1] and others[last] < end:
                last += 1
            if last > first:
                query_E[:] = keys_UE[owners[row]]
                add_products(query_E, keys, others, (first, last), products)
                begun[row] = last
