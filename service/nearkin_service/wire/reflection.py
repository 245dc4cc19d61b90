"""Server reflection under its final name as well: newer clients ask for v1 first, grpcio only has v1alpha."""

# ruff: noqa: N802 - the protocol's method names

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

_NAMES = ("grpc.reflection.v1.ServerReflection", reflection.SERVICE_NAME)


class Reflection(reflection.aio.ReflectionServicer):  # type: ignore[misc]
    """The messages of v1 and v1alpha are the same on the wire. Lives on the event loop."""

    def __init__(self, service_names: Iterable[str]) -> None:
        super().__init__((*service_names, reflection.SERVICE_NAME))
        self._closed = asyncio.Event()

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """For each of its names."""
        method = grpc.stream_stream_rpc_method_handler(
            self.ServerReflectionInfo,
            reflection_pb2.ServerReflectionRequest.FromString,
            reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        return tuple(
            grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method}) for name in _NAMES
        )

    async def ServerReflectionInfo(
        self, requests: AsyncIterator[Any], context: Any
    ) -> AsyncGenerator[Any, None]:
        async for reply in super().ServerReflectionInfo(self._until_closed(requests), context):
            yield reply

    async def _until_closed(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        closed = asyncio.create_task(self._closed.wait())
        try:
            while True:
                coming = asyncio.ensure_future(anext(requests, None))
                await asyncio.wait((coming, closed), return_when=asyncio.FIRST_COMPLETED)
                if not coming.done() or coming.result() is None:
                    coming.cancel()
                    return
                yield coming.result()
        finally:
            closed.cancel()

    def close(self) -> None:
        """Ends every stream: their callers may keep them open for as long as they live."""
        self._closed.set()
