"""Work shared among threads that leave the GIL: as many as FAISS was given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

from nearkin_service.engines.installed import load_faiss

Item = TypeVar("Item")
_LISTEN_SECONDS = 0.2


@cache
def worker_count() -> int:
    """Threads for one build: FAISS's own number, which follows OMP_NUM_THREADS and the cores at hand.

    Asked for once: it is per thread, and torch may share FAISS's OpenMP and change it.
    """
    return max(1, int(load_faiss().omp_get_max_threads()))


def in_threads(
    work: Callable[[Item], None],
    items: Sequence[Item],
    meanwhile: Callable[[int], None] = lambda done: None,
) -> None:
    """Do all items, in order of their start, calling `meanwhile(items begun)` a few times a second.

    The first exception, of `work` or of `meanwhile`, ends the others before their next item and is raised.
    """
    if len(items) < 2:
        for item in items:
            work(item)
        meanwhile(len(items))
        return
    begun = 0
    taking = threading.Lock()
    stop = threading.Event()

    def take() -> int | None:
        nonlocal begun
        with taking:
            if stop.is_set() or begun == len(items):
                return None
            begun += 1
            return begun - 1

    def worker() -> None:
        while (place := take()) is not None:
            work(items[place])

    with ThreadPoolExecutor(worker_count(), thread_name_prefix="nearkin-build") as pool:
        running = [pool.submit(worker) for _ in range(min(worker_count(), len(items)))]
        try:
            while not _ended(running):
                meanwhile(begun)
        finally:
            stop.set()
    for future in running:
        future.result()
    meanwhile(len(items))


def _ended(running: list[Future[None]]) -> bool:
    finished, remaining = wait(running, _LISTEN_SECONDS, FIRST_EXCEPTION)
    return not remaining or any(future.exception() for future in finished)
