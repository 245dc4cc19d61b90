"""Work shared among threads that leave the GIL: as many as FAISS was given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

from nearkin_service.engines.installed import load_faiss

Item = TypeVar("Item")


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
    """Do all items, in order of their start. Whoever has done one calls `meanwhile(items done)`.

    A thread that rests in `meanwhile` so begins no other item before it has rested. The first exception, of
    `work` or of `meanwhile`, ends the others before their next item and is raised.
    """
    if len(items) < 2:
        for item in items:
            work(item)
        meanwhile(len(items))
        return
    begun = done = 0
    counting = threading.Lock()
    stop = threading.Event()

    def take() -> int | None:
        nonlocal begun
        with counting:
            if stop.is_set() or begun == len(items):
                return None
            begun += 1
            return begun - 1

    def did() -> int:
        nonlocal done
        with counting:
            done += 1
            return done

    def worker() -> None:
        try:
            while (place := take()) is not None:
                work(items[place])
                meanwhile(did())
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(worker_count(), thread_name_prefix="nearkin-build") as pool:
        running = [pool.submit(worker) for _ in range(min(worker_count(), len(items)))]
        try:
            wait(running)
        finally:
            stop.set()
    for future in running:
        future.result()
    meanwhile(len(items))
