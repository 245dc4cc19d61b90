"""Whole numbers as the wire holds them: what does not fit is refused by name, before anything is sent."""

from __future__ import annotations

import operator

from nearkin_client.errors import invalid

MOST_INT32, MOST_INT64 = 2**31 - 1, 2**63 - 1


def whole_number(field: str, value: int, *, least: int = 1, most: int = MOST_INT64) -> int:
    """`value` as an int of Python's. InvalidArgument: not a whole number, or out of its range."""
    try:
        number = operator.index(value)
    except TypeError:
        invalid(field, value, "is not a whole number")
    if number < least:
        invalid(field, number, f"is not {least} or greater")
    if number > most:
        invalid(field, number, f"is not within {least}..{most}")
    return number
