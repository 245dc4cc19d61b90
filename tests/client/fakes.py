"""A gRPC server that answers as a test wants, on a real socket: for what a healthy service never does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

Behaviour = Callable[[bytes, grpc.ServicerContext], Any]


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, behaviours: dict[str, Behaviour]) -> None:
        self._behaviours = behaviours

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        name = details.method.rpartition("/")[2]
        behaviour = self._behaviours.get(name)
        if behaviour is None:
            return None
        if name in ("ReadTable", "WatchRun"):
            return grpc.unary_stream_rpc_method_handler(behaviour)
        if name == "WriteRows":
            return grpc.stream_unary_rpc_method_handler(behaviour)
        return grpc.unary_unary_rpc_method_handler(behaviour)


@contextmanager
def fake_service(**behaviours: Behaviour) -> Iterator[str]:
    """Serves the methods given, on raw bytes; yields the address."""
    server = grpc.server(ThreadPoolExecutor(4), handlers=[_Handler(behaviours)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
