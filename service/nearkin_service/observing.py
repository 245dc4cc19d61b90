"""What only a look at the catalogue can tell: metrics of each run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from nearkin_service.catalogue import Catalogue


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
