"""OpenTelemetry on either side of the wire, set up by the standard OTEL_* variables and by nothing else.

On when OTEL_TRACES_EXPORTER, OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set, unless
OTEL_SDK_DISABLED=true or the exporter is "none". The packages are an extra: `nearkin-client[tracing]`,
`nearkin-service[tracing]`.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

log = logging.getLogger("nearkin.tracing")

_EXPORTER = "OTEL_TRACES_EXPORTER"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_SERVICE = "/nearkin.v1.NeighbourService/"
_ENDLESS = _SERVICE + "WatchRun"
CLIENT, SERVICE = "nearkin-client", "nearkin-serve"
"""What the two sides are called unless OTEL_SERVICE_NAME says otherwise."""


def trace_channel(channel: grpc.Channel) -> grpc.Channel:
    """The channel with a span around every call, sent along with it; as it is where tracing is off."""
    provider = _provider(CLIENT)
    if provider is None:
        return channel
    from opentelemetry.instrumentation.grpc import GrpcInstrumentorClient, client_interceptor
    from opentelemetry.instrumentation.grpc.grpcext import intercept_channel

    if GrpcInstrumentorClient().is_instrumented_by_opentelemetry:
        return channel  # the application traces every channel of its process, this one too
    interceptor = client_interceptor(provider, filter_=lambda call: _traced(call.full_method))
    traced: grpc.Channel = intercept_channel(channel, interceptor)
    return traced


def server_interceptors() -> list[grpc.aio.ServerInterceptor]:
    """Continues the callers' traces in a `grpc.aio` service whose streaming handlers write by themselves."""
    provider = _provider(SERVICE)
    if provider is None:
        return []
    from opentelemetry.instrumentation.grpc._aio_server import OpenTelemetryAioServerInterceptor

    class Interceptor(OpenTelemetryAioServerInterceptor):
        def _intercept_aio_server_stream(self, behavior: Any, handler_call_details: Any) -> Any:
            # The library expects generators here; a handler that writes is awaited like any other.
            return self._intercept_aio_server_unary(behavior, handler_call_details)

    tracer = provider.get_tracer("nearkin.service")
    return [Interceptor(tracer, lambda call: _traced(call.method))]


def here() -> Any:
    """The span that the running code belongs to, to be `span`'s parent later; None where tracing is off."""
    if _provider(SERVICE) is None:
        return None
    from opentelemetry.context import get_current

    return get_current()


@contextmanager
def span(name: str, parent: Any, **attributes: str | int) -> Iterator[None]:
    """Work of the service that goes on after the call which asked for it. An error ends the span as one."""
    provider = _provider(SERVICE)
    if provider is None:
        yield
        return
    tracer = provider.get_tracer("nearkin.service")
    named = {f"nearkin.{key}": value for key, value in attributes.items()}
    with tracer.start_as_current_span(name, context=parent, attributes=named):
        yield


def _traced(method: str) -> bool:
    """Calls with an end, of our own service: no probes, and no watchers whose span would last for weeks."""
    return method.startswith(_SERVICE) and method != _ENDLESS


@functools.cache
def _provider(default_name: str) -> TracerProvider | None:
    """The application's own if it has set one, else one made from the environment; None: tracing is off."""
    exporter = _exporter_asked_for()
    if exporter is None:
        return None
    try:
        from opentelemetry import trace
        from opentelemetry.instrumentation import grpc as _instrumentation  # noqa: F401 - that it is there
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        spans = _exporter(exporter)
    except ImportError as error:
        log.error(  # noqa: TRY400 - an operator needs the sentence
            "no traces are sent: OTEL_* variables ask for them, but %s is missing; install "
            "nearkin-client[tracing] or nearkin-service[tracing], or set OTEL_TRACES_EXPORTER=none",
            error.name,
        )
        return None
    except ValueError as error:
        log.error("no traces are sent: %s", error)  # noqa: TRY400
        return None
    theirs = trace.get_tracer_provider()
    if not isinstance(theirs, trace.ProxyTracerProvider):
        return theirs
    named = Resource.create({SERVICE_NAME: default_name}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=named)
    provider.add_span_processor(BatchSpanProcessor(spans))
    log.info("traces are sent by the exporter %s", exporter)
    return provider


def _exporter_asked_for() -> str | None:
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    named = os.environ.get(_EXPORTER, "").strip().lower()
    if not named and any(os.environ.get(each) for each in _ENDPOINTS):
        named = "otlp"
    return None if named in ("", "none") else named


def _exporter(name: str) -> Any:
    """ValueError: an exporter or a protocol that is not ours. ImportError: its package is missing."""
    if name == "console":
        import sys

        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter(out=sys.stderr)
    protocol = next((os.environ[each] for each in _PROTOCOLS if os.environ.get(each)), "grpc")
    if name != "otlp":
        raise ValueError(f"{_EXPORTER}={name[:80]!r} is not otlp, console or none")
    if protocol != "grpc":
        raise ValueError(f"{_PROTOCOLS[1]}={protocol[:80]!r} is not grpc, the protocol that is spoken here")
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()
