"""A build's own threads, each with one thread of the matrix library: more would wait for each other.

What a library had before it has again when the last build is done that asked for this.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController

_counting = threading.Lock()
_inside: list[Any] = []  # a build each; the first holds what the libraries had before


@contextmanager
def one_thread_each() -> Iterator[None]:
    """While this lasts, NumPy's products use the calling thread alone."""
    with _counting:
        _inside.append(_libraries().limit(limits=1) if not _inside else _inside[0])
    try:
        yield
    finally:
        with _counting:
            limited = _inside.pop()
            if not _inside:
                limited.restore_original_limits()


@cache
def _libraries() -> ThreadpoolController:
    """NumPy's own, if it has one: FAISS, which may search for another build meanwhile, keeps its threads."""
    every = ThreadpoolController().select(user_api="blas")
    own = [each.filepath for each in every.lib_controllers if "numpy" in each.filepath]
    return every.select(filepath=own) if own else every
