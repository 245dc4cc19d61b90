"""Engine `mixed` on the CPU: scan, rerank, and whatever is not proved is searched row by row."""

from __future__ import annotations

import math
import time
from functools import partial

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.canonical import EMPTY
from nearkin_service.engines.complete import Queries
from nearkin_service.engines.contract import BuildMonitor, BuiltTable
from nearkin_service.engines.flat import spread
from nearkin_service.engines.keys import KeyedRows, fill_keys
from nearkin_service.engines.mixed.direct import build_direct
from nearkin_service.engines.mixed.held import Keys
from nearkin_service.engines.mixed.panels import search_in_panels
from nearkin_service.engines.mixed.products import aligned
from nearkin_service.engines.mixed.rerank import Reranking, cut_at
from nearkin_service.engines.mixed.rounded import RoundedKeys
from nearkin_service.engines.mixed.scan import keys_for_tiles, scan
from nearkin_service.engines.mixed.simd import WIDTH
from nearkin_service.engines.mixed.tiles import TileKeys
from nearkin_service.engines.mixed.versions import versions
from nearkin_service.engines.pacing import Pace
from nearkin_service.engines.ways import Job, way_of

_SIEVE_PLACES = 1 << 26  # of all rows: memory that is not touched unless they hold so much
_SECOND_BLOCK, _SECOND_ELEMENTS = 256, 1 << 24
_PANELS_AT_A_TIME = 4096


def build_mixed(source: KeyedRows, k: int, monitor: BuildMonitor, spare: int = 0) -> BuiltTable:
    """The exact neighbour table [N, k + spare], whose spare places may be empty for want of proof.

    Few classes are computed at once, short keys in panels, all else by a certified pass that is quick.
    """
    way = way_of(Job(len(source.rows), source.key_size, k))
    if way == "at once":
        return build_direct(source, k + spare, monitor)
    began, by_torch = time.monotonic(), False
    present = source.present()
    if way == "in panels":
        keys_MD = aligned((len(present), source.key_size), np.float32)
        fill_keys(keys_MD, source, present, monitor)
        join = partial(in_panels, keys_MD)
    else:
        keys, tiles = keys_for_tiles(source, present, monitor)
        by_torch = isinstance(tiles, RoundedKeys)
        join = partial(mixed_self_join, keys, tiles)
    keyed = time.monotonic()
    ranks_Mk, redone, seconds = join(k, monitor, spare)
    ids, scores = spread(ranks_Mk, present, len(source.rows))
    seconds = {"keys": keyed - began, **seconds}
    return BuiltTable(ids, scores, "mixed", "cpu", True, redone, seconds, versions(by_torch=by_torch))


def in_panels(
    keys_MD: NDArray[np.float32], k: int, monitor: BuildMonitor, spare: int = 0
) -> tuple[NDArray[np.int64], int, dict[str, float]]:
    """Like `mixed_self_join`, for keys so short that sieves cost more than computing each product twice."""
    began, count = time.monotonic(), len(keys_MD)
    ranks_Mk, redone = np.full((count, k + spare), EMPTY), 0
    pace = Pace(monitor, "search", count)
    for start in range(0, count, _PANELS_AT_A_TIME):
        own = np.arange(start, min(count, start + _PANELS_AT_A_TIME))
        queries = Queries(keys_MD[own], own)
        ranks_Mk[own], again = search_in_panels(keys_MD, queries, k + spare, monitor)
        redone += again
        pace.done(start + len(own))
    return ranks_Mk, redone, {"search": time.monotonic() - began}


def mixed_self_join(
    keys: Keys, tiles: TileKeys, k: int, monitor: BuildMonitor, spare: int = 0
) -> tuple[NDArray[np.int64], int, dict[str, float]]:
    """Ranks int64 [M, k + spare], how many rows needed the second path, and seconds by stage."""
    every, count = k + spare, keys.shape[0]
    if not count:
        return np.full((0, every), EMPTY), 0, {}
    times = [time.monotonic()]
    sieve = scan(tiles, every, sieve_places(count, every), monitor)
    times.append(time.monotonic())
    found_Mk, reach_M = Reranking(keys, sieve, every, monitor).run()
    ranks_Mk = cut_at(reach_M, found_Mk)
    times.append(time.monotonic())
    redo = np.flatnonzero(ranks_Mk[:, k - 1] == EMPTY)
    if len(redo):
        search_again(redo, keys.whole(), ranks_Mk, monitor)
    times.append(time.monotonic())
    names = ("scan", "rerank", "second path")
    return ranks_Mk, len(redo), dict(zip(names, np.diff(times).tolist(), strict=True))


def search_again(
    redo: NDArray[np.int64],
    keys_MD: NDArray[np.float32],
    ranks_Mk: NDArray[np.int64],
    monitor: BuildMonitor,
    names_M: NDArray[np.int64] | None = None,
) -> None:
    """Put the ranks of some keys in their place, each found among all keys."""
    pace = Pace(monitor, "second path", len(redo))
    step = max(_SECOND_BLOCK, min(_PANELS_AT_A_TIME, _SECOND_ELEMENTS // max(1, keys_MD.shape[1])))
    for start in range(0, len(redo), step):
        pace.done(start)
        own = redo[start : start + step]
        queries = Queries(keys_MD[own], own)
        ranks_Mk[own], _ = search_in_panels(keys_MD, queries, ranks_Mk.shape[1], monitor, names_M)


def sieve_places(count: int, k: int) -> tuple[int, int]:
    """With how many places a row's sieve begins, and how many there are for all rows to grow."""
    most = count + WIDTH
    width = math.ceil(min(most, 4 * k + 64) / WIDTH) * WIDTH
    return width, count * min(most, max(6 * k + 256, _SIEVE_PLACES // count))
