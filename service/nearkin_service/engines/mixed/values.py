"""What the int16 of a tile stand for: a product in fixed point, or the upper half of a float32.

Both order like the products, as far as they are told apart. A bfloat16 that is negative does not: of those
only the positive are looked at, and its floor is 0. In fixed point every product counts.

An encoding is known by its `rounding`: the share of a bfloat16 that rounding may have taken, or 0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.mixed.compiling import compiled

ROUNDING = 2.0**-8 * 1.01
"""Rounding a sum to bfloat16 moves it by at most this share of the result."""
FIXED = 0.0
"""The `rounding` of fixed point, whose step is a part of a key's `errors`."""
STEPS = 32000.0
"""Steps between 0 and 1 in fixed point."""
CLOSED = np.int16(32767)
"""The limit of a row whose sieve overflowed: nothing passes any more."""
VACANT = np.int16(-32768)
"""In place of a value where there is none; no value is as low."""


def floor_of(rounding: float) -> np.int16:
    """The lowest limit: in fixed point it lets everything pass, in bfloat16 what is positive."""
    return np.int16(0) if rounding else VACANT


@compiled
def limit_below(kth: Any, error: Any, rounding: Any) -> Any:
    """The limit under which nothing can still belong to the k best, given a k-th best value so far."""
    if rounding == 0:
        return np.int16(max(np.int64(VACANT), np.int64(kth) - np.int64(2 * error * STEPS) - 1))
    value = np.int32(np.int32(kth) << np.int32(16)).view(np.float32)
    least = (value * (1 - rounding) - 2 * error) / (1 + rounding)
    if least <= 0:
        return np.int16(0)
    bits = np.float32(least).view(np.int32) >> 16
    return np.int16(max(np.int32(0), bits - np.int32(1)))


def as_scores(values: NDArray[np.int16], rounding: float) -> NDArray[np.float64]:
    """The products that values stand for."""
    if rounding == FIXED:
        return values / STEPS
    return (values.astype(np.int32) << 16).view(np.float32).astype(np.float64)


def least_values(
    scores: NDArray[np.float64], errors: NDArray[np.float64], rounding: float
) -> NDArray[np.int16]:
    """The least value that can stand for so good a score, given by how much products can be off."""
    products = scores - errors
    if rounding == FIXED:
        steps = np.floor(products * STEPS - 2.0**-20)
        return np.asarray(np.clip(steps, int(VACANT) + 1, int(CLOSED)), np.int16)
    below = np.maximum(products, 0) / (1 + rounding) * (1 - 2.0**-23)
    bits = (below.astype(np.float32).view(np.int32) + 0xFFFF) >> 16
    return bits.astype(np.int16)


def limits_below(
    scores: NDArray[np.float64], errors: NDArray[np.float64], rounding: float
) -> NDArray[np.int16]:
    """Limits under which nothing scores so much."""
    values = least_values(scores, errors, rounding).astype(np.int32) - 1
    return np.maximum(values, int(floor_of(rounding))).astype(np.int16)


def reach_of(limits: NDArray[np.int16], errors: NDArray[np.float64], rounding: float) -> NDArray[np.float64]:
    """The greatest score of what a sieve may have dropped: its limit's, or any if it was closed."""
    reach = as_scores(limits, rounding) * (1 + rounding) + errors
    reach = np.where(limits == VACANT, -math.inf, reach)
    return np.where(limits == CLOSED, math.inf, reach)
