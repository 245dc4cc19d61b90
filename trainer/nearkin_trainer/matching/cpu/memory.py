"""Large results on large pages: with 4 KiB pages the kernel's page faults cost more than the products."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)


def empty_on_huge_pages(*shape: int) -> Tensor:
    """An uninitialised float32 tensor; asks for 2 MiB pages where it is large and the system has them."""
    tensor = torch.empty(shape, dtype=torch.float32)
    start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    length = (tensor.data_ptr() + tensor.nbytes - start) // HUGE_PAGE * HUGE_PAGE
    if MADV_HUGEPAGE is not None and length > 0:
        # Advice only: where it is refused, the pages are small and everything still works.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_HUGEPAGE)
    return tensor
