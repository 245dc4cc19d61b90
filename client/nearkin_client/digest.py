"""The CRC32C of all rows that one rank sends, put together from those of its messages."""

from __future__ import annotations

from nearkin.v1.checksums import crc32c, followed_by

from nearkin_client.arrays import Rows


class Digest:
    """Of the rows that one rank sends. One thread at a time."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._known: dict[int, tuple[int, int]] = {}

    def note(self, start: int, stop: int, crc: int) -> None:
        """These rows (counted from the first one given) have this CRC32C."""
        self._known[start] = (stop, crc)

    def whole(self, step: int) -> int:
        """Of all rows in order. What no message covers is read, so many rows at a time."""
        crc = at = 0
        while at < self._rows.count:
            stop, part = self._known.get(at) or self._read(at, step)
            crc = followed_by(crc, part, (stop - at) * self._rows.row_bytes)
            at = stop
        return crc

    def _read(self, start: int, step: int) -> tuple[int, int]:
        """Up to the next message: after an interruption they need not join."""
        end = min(start + step, self._rows.count)
        stop = min((known for known in self._known if start < known < end), default=end)
        return stop, crc32c(self._rows.payload(start, stop))
