"""Engines: neighbour tables and nearest-class queries on normalised keys. FAISS lives here; gRPC does not."""

from nearkin_service.engines.choice import build_table, describe_engines, open_searcher, update_table
from nearkin_service.engines.contract import (
    BuildCancelled,
    BuildMonitor,
    BuildRequest,
    BuiltTable,
    EngineDescription,
    LocationOptions,
    MeasuredRecall,
    Neighbours,
    Parent,
    Searcher,
)
from nearkin_service.engines.devices import resolve_device
from nearkin_service.engines.workers import worker_count

__all__ = [
    "BuildCancelled",
    "BuildMonitor",
    "BuildRequest",
    "BuiltTable",
    "EngineDescription",
    "LocationOptions",
    "MeasuredRecall",
    "Neighbours",
    "Parent",
    "Searcher",
    "build_table",
    "describe_engines",
    "open_searcher",
    "resolve_device",
    "update_table",
    "worker_count",
]
