"""Memory of large results, used again by the next step.

The C library gives a large block back to the system as soon as it is freed. Every step then pays for new
pages, which in a virtual machine that has to ask its host for them can cost more than the products. Pages of
2 MiB, where the system has them, keep the first step from paying for 512 times as many.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)
SPARE = 1.25  # pages that nothing touches cost nothing, and the next step may touch a few more classes
LARGEST_WASTE = 4  # a block so many times too large is left to somebody else


class Blocks:
    """Lends float32 blocks as tensors; a block comes back when the last tensor that sees it is gone."""

    def __init__(self, kept: int) -> None:
        """kept: how many blocks may lie idle; the one longest idle goes back to the system."""
        self._idle: list[Tensor] = []
        self._kept = kept
        # A tensor may die on any thread and in the middle of anything, this lock included.
        self._returned: deque[Tensor] = deque()
        self._lock = threading.Lock()

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised float32 tensor."""
        size = math.prod(shape)
        if 4 * size < HUGE_PAGE:
            return torch.empty(shape, dtype=torch.float32)
        block = self._taken(size)
        if block is None:
            block = _advised(torch.empty(int(size * SPARE), dtype=torch.float32))
        seen = block.numpy()[:size]
        weakref.finalize(seen, self._returned.append, block).atexit = False
        return torch.from_numpy(seen).view(shape)

    def renew_lock(self) -> None:
        self._lock = threading.Lock()

    def _taken(self, size: int) -> Tensor | None:
        with self._lock:
            while self._returned:
                self._idle.append(self._returned.popleft())
            del self._idle[: -self._kept]
            fitting = [block for block in self._idle if size <= block.numel() <= LARGEST_WASTE * size]
            if not fitting:
                return None
            chosen = min(fitting, key=Tensor.numel)
            self._idle = [block for block in self._idle if block is not chosen]
            return chosen


def _advised(block: Tensor) -> Tensor:
    start = -(-block.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    length = (block.data_ptr() + block.nbytes - start) // HUGE_PAGE * HUGE_PAGE
    # Of a small block, the last page would be a large part.
    if MADV_HUGEPAGE is not None and length >= 16 * HUGE_PAGE:
        # Advice only: where it is refused, the pages are small and everything still works.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_HUGEPAGE)
    return block


blocks = Blocks(kept=8)
# Another thread may have held the lock, and does not exist in the child.
os.register_at_fork(after_in_child=blocks.renew_lock)
