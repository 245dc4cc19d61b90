"""What the service counts, for Prometheus. One registry per service: several can live in one process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800)


class Metrics:
    """Names start with `nearkin_`; units are in the names."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.push_bytes = self._counter("push_bytes", "Bytes of rows that were stored or compared")
        self.table_reads = self._counter("table_reads", "Tables that were read to their end")
        self.table_bytes = self._counter("table_bytes", "Bytes of tables that were sent")
        self.queries = self._counter(
            "nearest_queries", "Classes and vectors whose nearest classes were asked for"
        )
        self.generations = self._counter("generations_published", "Generations that were published")
        self.errors = self._counter("errors", "Calls that ended in an error", "method", "code")
        self.builds_failed = self._counter("builds_failed", "Builds that came to nothing")
        self.build_seconds = self._histogram("build_seconds", "Seconds of a build, by stage", "stage")
        self.waiting_readers = self._gauge("waiting_readers", "Readers that wait for an epoch")
        self.queued_builds = self._gauge("queued_builds", "Pushes that wait for their build")
        self.open_pushes = self._gauge("open_pushes", "Pushes that are open or being built")
        self.runs = self._gauge("runs", "Runs")
        self.quarantined = self._gauge("quarantined", "Damaged things set aside at this start")
        self.disk_free = self._gauge("disk_free_bytes", "Free bytes of the data directory's disk")

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"nearkin_{name}", what, labels, registry=self.registry)

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return Gauge(f"nearkin_{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, *labels: str) -> Histogram:
        return Histogram(f"nearkin_{name}", what, labels, buckets=_SECONDS, registry=self.registry)
