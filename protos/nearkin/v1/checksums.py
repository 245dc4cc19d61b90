"""CRC32C of bytes that lie in several places, from the CRC32C of each: nothing is read again.

A CRC is the remainder of a polynomial over GF(2) modulo CRC32C's; bytes appended to a message multiply what came
before by a power of x. Polynomials are kept bit-reversed, as CRC32C has them: bit 31 is x^0.
"""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0x82F63B78
_ONE = 1 << 31
_ALL = 0xFFFF_FFFF


def followed_by(first: int, second: int, second_bytes: int) -> int:
    """The CRC32C of two pieces on end, of which the second has so many bytes."""
    return _product(_power(second_bytes), first) ^ second


def of_zeros(count: int) -> int:
    """The CRC32C of so many zero bytes."""
    return _product(_power(count), _ALL) ^ _ALL


@lru_cache(maxsize=256)
def _power(nbytes: int) -> int:
    """x^(8 * nbytes)."""
    result, square = _ONE, _ONE >> 8
    while nbytes:
        if nbytes & 1:
            result = _product(square, result)
        square = _product(square, square)
        nbytes >>= 1
    return result


def _product(a: int, b: int) -> int:
    result, place = 0, _ONE
    while place:
        if a & place:
            result ^= b
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
        place >>= 1
    return result
