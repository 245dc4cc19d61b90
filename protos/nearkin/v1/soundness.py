"""What `WriteRowsRequest.sound` says of rows: all is finite, and none is all zero.

Both ends look in the same way, once over bytes that lie in a core's cache. Other threads of Python go on
meanwhile: rows one by one (`np.vecdot`) would keep them waiting.

Dimension letters: n rows, R elements of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

INFINITY = {"float32": 0x7F80_0000, "float16": 0x7C00, "bfloat16": 0x7F80}
"""As bits, by wire dtype."""
_SIGN = 0x8000  # of 16 bits


def all_finite(bits: NDArray[np.unsignedinteger[Any]], dtype: str) -> bool:
    """Of elements as unsigned bits, in one dimension.

    False, too, where the squares of float32 add up to more than it can hold.
    """
    if dtype == "float32":
        values = bits.view(np.float32)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return bool(np.dot(values, values) < np.inf)
    infinity = INFINITY[dtype]  # what is not finite is the largest of its sign
    return bool(bits.view(np.int16).max() < infinity and bits.max() < infinity | _SIGN)


def zero_rows(bits_nR: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.int64]:
    """The rows of nothing but zeros, of either sign: few begin with one."""
    left = np.flatnonzero(bits_nR[:, 0] << 1 == 0)
    for some in (slice(1, 16), slice(16, None)):
        if len(left):
            left = left[~(bits_nR[left, some] << 1).any(axis=1)]
    return left
