"""The memory a process holds, in MiB, and the most it held."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path


def settled() -> None:
    """Give back what is free, so that what is taken afterwards shows."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def reset_peak() -> float:
    """Start a new high-water mark; the resident set now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident()


def peak() -> float:
    return _status("VmHWM")


def resident() -> float:
    return _status("VmRSS")


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    return float("nan")
