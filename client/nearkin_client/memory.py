"""Memory of tables that nobody holds any more, kept for the next ones.

The kernel clears every page that it hands out anew, which costs about as much as receiving into it does. A
job reads a table of one size epoch after epoch.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_COLUMNS = 2
MOST_BYTES = 1 << 30
"""What is kept, together; larger columns are not."""
SMALLEST_BYTES = 1 << 20


class TableMemory:
    """The spare memory of one client. Any thread; arrays may be dropped on any, too."""

    def __init__(self) -> None:
        self._spare: deque[mmap.mmap] = deque()

    def empty(self, shape: tuple[int, int], dtype: str) -> NDArray[Any]:
        """An array of any content. Its memory comes back by itself once it and every view of it is gone."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if not SMALLEST_BYTES <= nbytes <= MOST_BYTES // MOST_COLUMNS:
            return np.empty(shape, dtype)
        pages = self._taken(nbytes) or _made(nbytes)
        whole = np.frombuffer(pages, dtype)
        weakref.finalize(whole, _keep, weakref.ref(self), pages).atexit = False
        return whole.reshape(shape)

    def _taken(self, nbytes: int) -> mmap.mmap | None:
        """A spare of this size; others are let go, as tables of their size are no longer read."""
        while self._spare:
            pages = self._spare.popleft()
            if len(pages) == nbytes:
                return pages
        return None

    def keep(self, pages: mmap.mmap) -> None:
        """Takes memory back; the oldest goes where there is too much."""
        self._spare.append(pages)
        while len(self._spare) > MOST_COLUMNS:
            self._spare.popleft()


def _keep(memory: weakref.ref[TableMemory], pages: mmap.mmap) -> None:
    owner = memory()
    if owner is not None:
        owner.keep(pages)


def _made(nbytes: int) -> mmap.mmap:
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
