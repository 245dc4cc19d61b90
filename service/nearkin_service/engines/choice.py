"""Which engine builds: by name, or by the rule of `auto`."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.auto import ENGINES, choose, mixed_lacks
from nearkin_service.engines.contract import (
    BuildMonitor,
    BuildRequest,
    BuiltTable,
    EngineDescription,
    KeyName,
    LocationOptions,
    Neighbours,
    Parent,
    Searcher,
    reserve_places,
)
from nearkin_service.engines.devices import resolve_device
from nearkin_service.engines.flat import FlatSearcher, build_flat
from nearkin_service.engines.incremental import Depth, Means, fits, update
from nearkin_service.engines.installed import faiss_version
from nearkin_service.engines.ivf import build_ivf
from nearkin_service.engines.keys import KeyedRows
from nearkin_service.engines.loading import built, first_use, ready
from nearkin_service.engines.qaconv import (
    LocationScore,
    LocationSearcher,
    all_maps,
    best_by_location,
    candidates_for,
)
from nearkin_service.engines.reindexed import ByIndex
from nearkin_service.engines.ways import Job, few

log = logging.getLogger("nearkin.engines")

_KEYS = ("flat", "pooled", "qaconv")
_DEFAULTS = LocationOptions()


def build_table(rows_NR: NDArray[Any], request: BuildRequest, monitor: BuildMonitor) -> BuiltTable:
    """The neighbour table of rows [N, R] in wire dtype; the bytes of absent classes' rows are ignored.

    Raises:
        ValueError: the request names an unknown engine, key or device, or rows without a key.
        BuildCancelled: the monitor said so.
    """
    _check(rows_NR, request)
    device = resolve_device(request.device)
    source = KeyedRows(rows_NR, request.row_shape, request.key, request.absent)
    if request.key == "qaconv":
        return _build_qaconv(source, request, device, monitor)
    return _build(source, request, device, monitor)


def _build(source: KeyedRows, request: BuildRequest, device: str, monitor: BuildMonitor) -> BuiltTable:
    job = Job(len(source.rows), source.key_size, request.k)
    engine, why = _engine(request, job, device)
    spare = _spare(source, job, engine, device)
    log.info("%d x %d, key %s, k %d: engine %s; %s", *source.rows.shape, source.key, request.k, engine, why)
    if engine == "mixed" and device != "cpu":
        from nearkin_service.engines.mixed.gpu import build_on_gpu

        return build_on_gpu(source, request.k, monitor)
    if engine == "mixed":
        with first_use(job):
            from nearkin_service.engines.mixed.cpu import build_mixed

            table = build_mixed(source, request.k, monitor, spare)
        built(job)
        return _split(table, request.k)
    if engine == "ivf":
        return build_ivf(source, request.k, request.target_recall, monitor)
    return _split(build_flat(source, request.k, device, monitor, spare), request.k)


def _spare(source: KeyedRows, job: Job, engine: str, device: str) -> int:
    """Places that a build holds in reserve: where an update from its table can pay."""
    exact = engine in ("flat", "mixed") and device == "cpu" and source.key != "qaconv"
    return reserve_places(job.classes, job.k) if exact else 0


def _split(table: BuiltTable, k: int) -> BuiltTable:
    """The k best, and apart from them what came after."""
    if table.ids.shape[1] == k:
        return table
    reserve = Neighbours(table.ids[:, k:].copy(), table.scores[:, k:].copy())
    return replace(table, ids=table.ids[:, :k].copy(), scores=table.scores[:, :k].copy(), reserve=reserve)


def update_table(
    rows_NR: NDArray[Any], request: BuildRequest, parent: Parent, monitor: BuildMonitor
) -> BuiltTable:
    """The same table as `build_table`, bit for bit, sooner if little changed since the exact parent.

    Falls back to a full build, and logs why, if the parent's shape, k or dtype differ, if the engine is
    approximate or works on a GPU, or if a full build would take no longer.
    """
    _check(rows_NR, request)
    source = KeyedRows(rows_NR, request.row_shape, request.key, request.absent)
    device = resolve_device(request.device)
    job = Job(len(rows_NR), source.key_size, request.k)
    engine, _ = _engine(request, job, device)
    if engine == "ivf" or device != "cpu" or not fits(source, request.k, parent):
        log.info("full build: engine %s on %s, or the parent is of another kind", engine, device)
        return build_table(rows_NR, request, monitor)
    depth = Depth(request.k, _spare(source, job, engine, device))
    with first_use(job) if engine == "mixed" else nullcontext():
        table = update(source, depth, parent, _means(engine, job), monitor)
    if table is None:
        log.info("full build: too much changed since the parent")
        return build_table(rows_NR, request, monitor)
    return replace(_split(table, request.k), engine=engine)


def _engine(request: BuildRequest, job: Job, device: str) -> tuple[str, str]:
    """What builds this now, and why."""
    engine, why = choose(request.engine, job, device)
    if engine == "mixed" and request.engine == "auto" and device == "cpu" and not ready(job):
        return "flat", "auto, since the loops of mixed are not loaded"
    return engine, why


def _means(engine: str, job: Job) -> Means:
    """How an update by this engine goes about it; few classes are not worth loading loops for."""
    if engine != "mixed" or few(job.classes):
        full_build = 1.0 if engine == "flat" else 0.3
        return Means(partial(ByIndex, full_build), full_build / 2)
    from nearkin_service.engines.mixed.updating import ByTiles

    return Means(ByTiles, 0.5)


def _build_qaconv(source: KeyedRows, request: BuildRequest, device: str, monitor: BuildMonitor) -> BuiltTable:
    score = LocationScore(request.row_shape, request.qaconv.weights)
    candidates = candidates_for(request.k, request.qaconv.candidates, len(source.rows) - 1)
    pooled = _build(source, replace(request, k=candidates), device, monitor)
    began = time.monotonic()
    maps_NCL = all_maps(source, score, monitor)
    best = best_by_location(
        lambda row: maps_NCL[row], maps_NCL, pooled.ids, score, k=request.k, monitor=monitor
    )
    seconds = {**pooled.stage_seconds, "rerank by location": time.monotonic() - began}
    return replace(pooled, ids=best.ids, scores=best.scores, stage_seconds=seconds)


def open_searcher(
    rows_NR: NDArray[Any],
    row_shape: tuple[int, ...],
    key: KeyName,
    absent: NDArray[np.int64],
    device: str,
    *,
    qaconv: LocationOptions = _DEFAULTS,
) -> Searcher:
    """Exact nearest-class answers on these rows; `qaconv` is what a table of that key was built with."""
    source = KeyedRows(rows_NR, row_shape, key, absent)
    if key == "qaconv":
        score = LocationScore(row_shape, qaconv.weights)
        return LocationSearcher(source, score, resolve_device(device), qaconv.candidates)
    return FlatSearcher(source, resolve_device(device))


def describe_engines() -> list[EngineDescription]:
    """Every engine that this version knows, whether it can be used here, and why not."""
    lacking = mixed_lacks()
    return [
        EngineDescription("flat", True, faiss_version(), exact=True),
        EngineDescription(
            "mixed", lacking is None, lacking or "the processor multiplies int16 quickly", exact=True
        ),
        EngineDescription("ivf", True, faiss_version(), exact=False),
    ]


def _check(rows_NR: NDArray[Any], request: BuildRequest) -> None:
    if request.key not in _KEYS:
        raise ValueError(f"key: {request.key!r} is not one of {', '.join(_KEYS)}")
    if request.engine not in ENGINES:
        raise ValueError(f"engine: {request.engine!r} is not one of {', '.join(ENGINES)}")
    if not 0 < request.target_recall <= 1:
        raise ValueError(f"target_recall: {request.target_recall} is not in (0, 1]")
    if not 1 <= request.k <= len(rows_NR) - 1:
        raise ValueError(f"k: {request.k} is not in [1, {len(rows_NR) - 1}] for {len(rows_NR)} classes")
