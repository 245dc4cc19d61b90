"""Traces across client and service, sent to a collector on a real socket; OTEL_* variables suffice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

WAIT = 60.0
SERVICE = "/nearkin.v1.NeighbourService/"
PUSH = """
import numpy as np
from nearkin_client import InvalidArgument, NeighbourClient

rows = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
with NeighbourClient(run="traced", shared_memory=False) as client:
    client.push(rows, epoch=0, k=5)
    assert client.table(epoch=0).ids.shape == (20, 5)
    watching = client.watch(timeout=5)
    next(watching)
    watching.close()
    try:
        client.nearest(classes=[99], k=5)
    except InvalidArgument:
        pass
"""


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span it is sent, with the name of who sent it."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        self.raw = b""
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        for each in request.resource_spans:
            names = {pair.key: pair.value.string_value for pair in each.resource.attributes}
            sender = names["service.name"]
            self.spans += [(sender, span) for scope in each.scope_spans for span in scope.spans]
        self.raw += request.SerializeToString()
        return trace_service_pb2.ExportTraceServiceResponse()

    def close(self) -> None:
        self._server.stop(None).wait()

    def find(self, sender: str, name: str) -> Any:
        return next(span for who, span in self.spans if (who, span.name) == (sender, name))


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def attributes(span: Any) -> dict[str, Any]:
    return {pair.key: pair.value for pair in span.attributes}


def serving(folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nearkin_service", "--data-dir", str(folder / "data"), "--device", "cpu"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--listen", f"unix://{folder}/s.sock"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
    assert process.stdout is not None
    assert "ready" in process.stdout.readline(), (folder / "log").read_text()
    return process


def stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    assert process.wait(WAIT) == 0
    assert process.stdout is not None
    process.stdout.close()


def test_one_trace_across_client_and_service(collector: Collector, tmp_path: Path) -> None:
    environment = os.environ | {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "NEARKIN_SERVICE": f"unix://{tmp_path}/s.sock",
    }
    process = serving(tmp_path, environment)
    trainer = environment | {"OTEL_SERVICE_NAME": "trainer"}
    done = subprocess.run(
        [sys.executable, "-c", PUSH], env=trainer, capture_output=True, text=True, check=False, timeout=WAIT
    )
    assert done.returncode == 0, done.stderr
    stop(process)
    for method in ("BeginPush", "WriteRows", "ReadTable", "Nearest"):
        theirs = collector.find("trainer", SERVICE + method)
        ours = collector.find("nearkin-serve", SERVICE + method)
        assert (ours.trace_id, ours.parent_span_id) == (theirs.trace_id, theirs.span_id), method
    build = collector.find("nearkin-serve", "build")
    (asked_by,) = [span for _, span in collector.spans if span.span_id == build.parent_span_id]
    assert asked_by.name in (SERVICE + "WriteRows", SERVICE + "CommitPush"), "whichever closed the push"
    assert build.trace_id in {span.trace_id for who, span in collector.spans if who == "trainer"}
    assert attributes(build)["nearkin.run"].string_value == "traced"
    refused = attributes(collector.find("nearkin-serve", SERVICE + "Nearest"))["rpc.grpc.status_code"]
    assert refused.int_value == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert SERVICE + "WatchRun" not in {span.name for _, span in collector.spans}


def test_a_token_is_in_no_trace(collector: Collector, tmp_path: Path) -> None:
    environment = os.environ | {
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{collector.port}",
        "NEARKIN_SERVICE": f"unix://{tmp_path}/s.sock",
    }
    data = tmp_path / "data"
    made = subprocess.run(
        [sys.executable, "-m", "nearkin_service", "token", "create", "--scope", "write", "--data-dir", data],
        capture_output=True,
        text=True,
        check=True,
        timeout=WAIT,
    )
    token = made.stdout.strip()
    process = serving(tmp_path, environment)
    subprocess.run(
        [sys.executable, "-c", PUSH], env=environment | {"NEARKIN_TOKEN": token}, check=True, timeout=WAIT
    )
    stop(process)
    collector.find("nearkin-client", SERVICE + "WriteRows")
    collector.find("nearkin-serve", SERVICE + "WriteRows")
    secret = token.split("_", 2)[2]  # may hold the same sign
    assert len(secret) == 43
    assert secret.encode() not in collector.raw


def test_an_application_may_trace_all_its_channels_itself(collector: Collector, tmp_path: Path) -> None:
    """Its instrumentation turns streams into generators; the client neither minds nor traces twice."""
    environment = os.environ | {"NEARKIN_SERVICE": f"unix://{tmp_path}/s.sock"}
    process = serving(tmp_path, environment)
    tracing = environment | {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}"}
    instrumented = (
        "from opentelemetry.instrumentation.grpc import GrpcInstrumentorClient\n"
        "GrpcInstrumentorClient().instrument()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", instrumented + PUSH],
        env=tracing,
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT,
    )
    assert done.returncode == 0, done.stderr
    stop(process)
    assert not collector.spans


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "nearkin-service[tracing]"),
        ({"OTEL_TRACES_EXPORTER": "jaeger"}, "is not otlp, console or none"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "'http/protobuf' is not grpc",
        ),
        ({"OTEL_TRACES_EXPORTER": "none"}, ""),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"}, ""),
        ({}, ""),
    ],
    ids=str,
)
def test_what_cannot_be_traced_is_said_once(variables: dict[str, str], said: str) -> None:
    """Without the packages where they would be used; the channel is the plain one."""
    missing = "sys.modules['opentelemetry'] = None" if said.endswith("]") else "pass"
    script = f"""
import sys
{missing}
from nearkin_client.channel import Endpoint
first, second = (Endpoint.resolve("127.0.0.1:1", None).open_channel() for _ in range(2))
assert type(first).__module__.startswith("grpc."), type(first)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no traces are sent") == (1 if said else 0), done.stderr
    assert said in done.stderr
