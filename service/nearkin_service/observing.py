"""What only a look at the catalogue can tell: metrics of each run, and each run's health."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from nearkin_service.catalogue import Catalogue, Run
from nearkin_service.values import PushState

RUN_HEALTH = "run/"
"""`run/NAME` is the name of a run's health: SERVING, or NOT_SERVING while its latest push has failed."""


class RunMetrics(Collector):
    """Looked up when Prometheus asks, on its own thread: a deleted run leaves nothing behind."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def collect(self) -> Iterable[GaugeMetricFamily]:
        runs = _stable(lambda: list(self._catalogue.runs.values()))
        views = _stable(lambda: [run.view() for run in runs])
        age = _gauge("newest_generation_age_seconds", "Age of a run's newest generation")
        when = _gauge("newest_generation_timestamp_seconds", "When a run's newest generation was published")
        kept = _gauge("generations", "Generations that a run has")
        size = _gauge("run_bytes", "Bytes of a run on disk")
        for view in views:
            kept.add_metric([view.name], view.generations)
            size.add_metric([view.name], view.bytes_on_disk)
            if view.newest is not None:
                when.add_metric([view.name], view.newest.published)
                age.add_metric([view.name], max(time.time() - view.newest.published, 0.0))
        return (age, when, kept, size)


class RunHealth(health.aio.HealthServicer):  # type: ignore[misc]
    """The standard health service, which also knows runs by the name `run/NAME`."""

    def __init__(self, catalogue: Catalogue) -> None:
        super().__init__()
        self._catalogue = catalogue

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
        if not request.service.startswith(RUN_HEALTH):
            return await super().Check(request, context)
        run = self._catalogue.runs.get(request.service.removeprefix(RUN_HEALTH))
        if run is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such run")
            return None
        well = health_pb2.HealthCheckResponse
        return well(status=well.NOT_SERVING if _failed(run) else well.SERVING)


def _failed(run: Run) -> bool:
    latest = next(reversed(run.pushes.values()), None)
    return latest is not None and latest.state is PushState.FAILED


def _gauge(name: str, what: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"nearkin_{name}", what, labels=["run"])


def _stable(look: Callable[[], Any]) -> Any:
    """The event loop may change a dictionary while another thread looks through it: look again."""
    for _ in range(100):
        try:
            return look()
        except RuntimeError:
            continue
    return []
