"""CRC32C, and that of bytes that lie in several places from the CRC32C of each: nothing is read again."""

from __future__ import annotations

from awscrt import checksums

from nearkin.v1.buffers import Buffer


def crc32c(data: Buffer, before: int = 0) -> int:
    """The CRC32C of these bytes, or of others on end whose CRC32C is `before`. From 32 KiB on without the GIL."""
    return int(checksums.crc32c(data, before))


def followed_by(first: int, second: int, second_bytes: int) -> int:
    """The CRC32C of two pieces on end, of which the second has so many bytes."""
    return int(checksums.combine_crc32c(first, second, second_bytes))


def of_zeros(count: int) -> int:
    """The CRC32C of so many zero bytes."""
    result, power, power_bytes = 0, crc32c(b"\0"), 1
    while count:
        if count & 1:
            result = followed_by(result, power, power_bytes)
        power, power_bytes = followed_by(power, power, power_bytes), 2 * power_bytes
        count >>= 1
    return result
