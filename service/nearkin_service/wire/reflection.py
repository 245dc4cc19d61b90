"""Server reflection under its final name: newer clients ask for v1 first, grpcio only registers v1alpha."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

_NAME = "grpc.reflection.v1.ServerReflection"


def reflection_v1(service_names: Iterable[str]) -> grpc.GenericRpcHandler:
    """The messages of v1 and v1alpha are the same on the wire."""
    servicer: Any = reflection.aio.ReflectionServicer(service_names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(_NAME, {"ServerReflectionInfo": handler})
