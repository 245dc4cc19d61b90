"""How the C library keeps memory that was freed.

Messages of some megabytes come and go by the thousand. Left to itself glibc gives their pages back each time,
and the kernel makes and zeroes new ones for the next.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 32 << 20  # what glibc takes at most; larger pieces (a build's) are given back at once as before
_KEPT = 128 << 20


def keep_message_buffers() -> bool:
    """Keeps freed buffers for the next message; up to 128 MiB. False: this C library has no such settings."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))
