"""How the loops of engine `mixed` are compiled: without the GIL, and kept on disk where there is room."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from numba import njit

log = logging.getLogger("nearkin.engines")


def compiled(function: Callable[..., Any]) -> Any:
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder to keep the machine code in, as in a read-only container
        log.debug("compiling %s anew in each process", function.__name__)
        return njit(nogil=True)(function)


def compiled_loosely(function: Callable[..., Any]) -> Any:
    """For float64 sums whose order does not matter: let the compiler use vectors."""
    loose = {"reassoc", "contract", "nsz"}
    try:
        return njit(nogil=True, cache=True, fastmath=loose)(function)
    except RuntimeError:
        return njit(nogil=True, fastmath=loose)(function)
