"""Torch computes with one thread per worker during a build, and with as many as before afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from nearkin_service.engines.workers import worker_count

_asking = threading.Lock()
_before: list[int] = []


@contextmanager
def torch_alone() -> Iterator[None]:
    """A build; each of its workers calls `one_thread`.

    What torch had before is asked for once: where another build is under way, it would answer 1. A thread
    that first uses torch then is given 1 too, and so is FAISS where both share one OpenMP.
    """
    import torch

    with _asking:
        if not _before:
            worker_count()
            _before.append(torch.get_num_threads())
    try:
        yield
    finally:
        torch.set_num_threads(_before[0])


def one_thread() -> None:
    """For the thread that calls."""
    import torch

    torch.set_num_threads(1)
