"""Engine `mixed` on the CPU: scan, rerank, and whatever is not proved is searched row by row."""

from __future__ import annotations

import math
import time

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.auto import AT_ONCE
from nearkin_service.engines.canonical import EMPTY
from nearkin_service.engines.complete import Queries
from nearkin_service.engines.contract import BuildMonitor, BuiltTable
from nearkin_service.engines.flat import spread
from nearkin_service.engines.keys import KeyedRows, fill_keys
from nearkin_service.engines.loading import loaded
from nearkin_service.engines.mixed.direct import build_direct
from nearkin_service.engines.mixed.panels import search_in_panels
from nearkin_service.engines.mixed.rerank import Reranking
from nearkin_service.engines.mixed.scan import scan, tile_keys
from nearkin_service.engines.mixed.simd import WIDTH
from nearkin_service.engines.mixed.versions import versions
from nearkin_service.engines.pacing import Pace

_SIEVE_PLACES = 1 << 23  # of all rows: more memory is slower, since the system has to clear it
_ROUNDED = 4  # times as many where tiles are bfloat16, which tell fewer rivals apart
_SECOND_BLOCK = 256
_PANEL_ELEMENTS, _PANEL_CLASSES, _PANEL_NEIGHBOURS = 1 << 20, 8192, 64
_PANELS_AT_A_TIME = 4096


def build_mixed(source: KeyedRows, k: int, monitor: BuildMonitor) -> BuiltTable:
    """The exact neighbour table: of few classes at once, of more by a certified pass that is quick."""
    count = len(source.rows)
    table = (build_direct if count <= AT_ONCE else scanned)(source, k, monitor)
    if count <= AT_ONCE or not short_enough(count, source.key_size, k):
        loaded(count)
    return table


def scanned(source: KeyedRows, k: int, monitor: BuildMonitor) -> BuiltTable:
    """The exact neighbour table of any number of classes: in panels, or by scanning."""
    began = time.monotonic()
    present = source.present()
    keys_MD = np.empty((len(present), source.key_size), np.float32)
    fill_keys(keys_MD, source, present, monitor)
    keyed = time.monotonic()
    join = in_panels if short_enough(len(present), source.key_size, k) else mixed_self_join
    ranks_Mk, redone, seconds = join(keys_MD, k, monitor)
    ids, scores = spread(ranks_Mk, present, len(source.rows))
    return BuiltTable(
        ids, scores, "mixed", "cpu", True, redone, {"keys": keyed - began, **seconds}, versions()
    )


def short_enough(count: int, size: int, k: int) -> bool:
    """Whether panels are quicker than a scan for so many keys of this size."""
    return count * size <= _PANEL_ELEMENTS and (count <= _PANEL_CLASSES or k >= _PANEL_NEIGHBOURS)


def in_panels(
    keys_MD: NDArray[np.float32], k: int, monitor: BuildMonitor
) -> tuple[NDArray[np.int64], int, dict[str, float]]:
    """Like `mixed_self_join`, for keys so short that sieves cost more than computing each product twice."""
    began, count = time.monotonic(), len(keys_MD)
    ranks_Mk, redone = np.full((count, k), EMPTY), 0
    pace = Pace(monitor, "search", count)
    for start in range(0, count, _PANELS_AT_A_TIME):
        own = np.arange(start, min(count, start + _PANELS_AT_A_TIME))
        ranks_Mk[own], again = search_in_panels(keys_MD, Queries(keys_MD[own], own), k, monitor)
        redone += again
        pace.done(start + len(own))
    return ranks_Mk, redone, {"search": time.monotonic() - began}


def mixed_self_join(
    keys_MD: NDArray[np.float32], k: int, monitor: BuildMonitor
) -> tuple[NDArray[np.int64], int, dict[str, float]]:
    """Ranks int64 [M, k], how many rows needed the second path, and seconds by stage."""
    if not len(keys_MD):
        return np.full((0, k), EMPTY), 0, {}
    times = [time.monotonic()]
    keys = tile_keys(keys_MD, monitor)
    times.append(time.monotonic())
    width = sieve_width(len(keys_MD), k, rounded=keys.values.dtype != np.float32)
    sieve = scan(keys, k, width, monitor)
    times.append(time.monotonic())
    ranks_Mk, certified = Reranking(keys_MD, sieve, k, monitor).run()
    times.append(time.monotonic())
    redo = np.flatnonzero(~certified)
    for start in range(0, len(redo), _SECOND_BLOCK):
        monitor.check()
        own = redo[start : start + _SECOND_BLOCK]
        ranks_Mk[own], _ = search_in_panels(keys_MD, Queries(keys_MD[own], own), k, monitor)
    times.append(time.monotonic())
    names = ("round", "scan", "rerank", "second path")
    return ranks_Mk, len(redo), dict(zip(names, np.diff(times).tolist(), strict=True))


def sieve_width(count: int, k: int, *, rounded: bool) -> int:
    """Places of a row's sieve: room for the k best, and for those that rounding cannot tell from them."""
    wanted = max(2 * k + 256, _SIEVE_PLACES * (_ROUNDED if rounded else 1) // count)
    return math.ceil(min(count + WIDTH, wanted) / WIDTH) * WIDTH
