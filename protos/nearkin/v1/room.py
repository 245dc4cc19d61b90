"""Memory that bytes pass through on their way into a file, where the kernel is quick to copy them from.

It is slower where their address and their place in the file differ modulo a cache line, as of most of NumPy's
arrays.
"""

from __future__ import annotations

import numpy as np

from nearkin.v1.buffers import Buffer

LINE_BYTES = 64
BEGINNINGS = range(0, LINE_BYTES, 16)
"""Where rows may begin in a file: NumPy's memory and PyTorch's is at multiples of 16 bytes."""


def agrees(data: Buffer, at: int) -> bool:
    """Whether the address of these bytes and `at` are the same modulo a cache line."""
    return (address(data) - at) % LINE_BYTES == 0


def address(data: Buffer) -> int:
    """Where these bytes, at least one, lie in memory."""
    return int(np.frombuffer(data, np.uint8).ctypes.data)


class Room:
    """For one thing after another: its pages stay. Each is valid until the next."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def of(self, length: int, at: int) -> memoryview:
        """So many bytes, whose address agrees with `at`."""
        if length + LINE_BYTES > len(self._bytes):
            self._bytes = np.empty(length + LINE_BYTES, np.uint8)
        shift = (at - self._bytes.ctypes.data) % LINE_BYTES
        return self._bytes[shift : shift + length].data
