"""Which engine builds: by name, or by the rule of `auto`."""

from __future__ import annotations

import logging
from typing import Any

from numpy.typing import NDArray

from nearkin_service.engines.auto import ENGINES, Job, choose, mixed_lacks
from nearkin_service.engines.contract import (
    BuildMonitor,
    BuildRequest,
    BuiltTable,
    EngineDescription,
    KeyName,
    Searcher,
)
from nearkin_service.engines.devices import faiss_version, resolve_device
from nearkin_service.engines.flat import FlatSearcher, build_flat
from nearkin_service.engines.keys import KeyedRows

log = logging.getLogger("nearkin.engines")

_KEYS = ("flat", "pooled")


def build_table(rows_NR: NDArray[Any], request: BuildRequest, monitor: BuildMonitor) -> BuiltTable:
    """The neighbour table of rows [N, R] in wire dtype; the bytes of absent classes' rows are ignored.

    Raises:
        ValueError: the request names an unknown engine, key or device, or rows without a key.
        BuildCancelled: the monitor said so.
    """
    _check(rows_NR, request)
    device = resolve_device(request.device)
    source = KeyedRows(rows_NR, request.row_shape, request.key, request.absent)
    engine, why = choose(request.engine, Job(len(rows_NR), source.key_size, request.k), device)
    log.info("%d x %d, key %s, k %d: engine %s; %s", *rows_NR.shape, request.key, request.k, engine, why)
    if engine == "mixed":
        from nearkin_service.engines.mixed.cpu import build_mixed

        return build_mixed(source, request.k, monitor)
    return build_flat(source, request.k, device, monitor)


def open_searcher(
    rows_NR: NDArray[Any],
    row_shape: tuple[int, ...],
    key: KeyName,
    absent: NDArray[Any],
    device: str,
) -> Searcher:
    """Exact nearest-class answers on these rows."""
    return FlatSearcher(KeyedRows(rows_NR, row_shape, key, absent), resolve_device(device))


def describe_engines() -> list[EngineDescription]:
    """Every engine that this version knows, whether it can be used here, and why not."""
    lacking = mixed_lacks()
    return [
        EngineDescription("flat", True, faiss_version(), exact=True),
        EngineDescription("mixed", lacking is None, lacking or "bfloat16 instructions are there", exact=True),
    ]


def _check(rows_NR: NDArray[Any], request: BuildRequest) -> None:
    if request.key not in _KEYS:
        raise ValueError(f"key: {request.key!r} is not one of {', '.join(_KEYS)}")
    if request.engine not in ENGINES:
        raise ValueError(f"engine: {request.engine!r} is not one of {', '.join(ENGINES)}")
    if not 1 <= request.k <= len(rows_NR) - 1:
        raise ValueError(f"k: {request.k} is not in [1, {len(rows_NR) - 1}] for {len(rows_NR)} classes")
