"""How the loops of engine `mixed` are compiled: without the GIL, and kept on disk where there is room."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

log = logging.getLogger("nearkin.engines")


def compiled(function: Callable[..., Any]) -> Any:
    return _njit(function)


def compiled_loosely(function: Callable[..., Any]) -> Any:
    """For float64 sums whose order does not matter: let the compiler use vectors."""
    return _njit(function, fastmath={"reassoc", "contract", "nsz"})


def _sources() -> str:
    """A digest of this package, whose loops are compiled into one another."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


_SOURCES = _sources()


def _njit(function: Callable[..., Any], **options: Any) -> Any:
    # Numba keeps compiled functions by name, and asks only whether the file that defines them has changed.
    function.__qualname__ += f"_{_SOURCES}"
    try:
        return njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # no folder to keep the machine code in, as in a read-only container
        log.debug("compiling %s anew in each process", function.__name__)
        return njit(nogil=True, **options)(function)
